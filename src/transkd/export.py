"""Export a network: ``python -m transkd.export weights=student.safetensors format=onnx output=student.onnx``."""

from typing import TYPE_CHECKING

from transkd.cli import hydra_command
from transkd.settings import ExportSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra_command("export", ExportSettings)
def main(cfg: "DictConfig") -> None:
    """Run the export; torch is imported only after the configuration has been checked."""
    from transkd.deploy.exporting import export

    export(ExportSettings.read(cfg))


if __name__ == "__main__":
    main()

"""Segment images: ``python -m transkd.predict weights=student.safetensors input=images/ output=predictions/``."""

from typing import TYPE_CHECKING

from transkd.cli import hydra_command
from transkd.settings import PredictSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra_command("predict", PredictSettings)
def main(cfg: "DictConfig") -> None:
    """Run the prediction; torch is imported only after the configuration has been checked."""
    from transkd.deploy.predicting import predict
    from transkd.training.device import device_of
    from transkd.training.process import prepare_process

    settings = PredictSettings.read(cfg)
    prepare_process(settings.keep_freed_memory, device_of(settings.device))
    predict(settings)


if __name__ == "__main__":
    main()

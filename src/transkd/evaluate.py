"""Score a network: ``python -m transkd.evaluate weights=student.safetensors +experiment=acdc protocol=full-res``."""

from typing import TYPE_CHECKING

from transkd.cli import hydra_command
from transkd.settings import EvaluateSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra_command("evaluate", EvaluateSettings)
def main(cfg: "DictConfig") -> None:
    """Compose, then evaluate; torch is imported only once the configuration stands."""
    from transkd.training.evaluation import evaluate

    evaluate(cfg)


if __name__ == "__main__":
    main()

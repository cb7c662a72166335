"""Evaluate a network: ``python -m transkd.evaluate weights=student.safetensors +experiment=acdc protocol=full-res``."""

from typing import TYPE_CHECKING

from transkd.cli import hydra_command
from transkd.settings import EvaluateSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra_command("evaluate", EvaluateSettings)
def main(cfg: "DictConfig") -> None:
    """Run the evaluation; torch is imported only after the configuration has been checked."""
    from transkd.training.evaluation import evaluate

    evaluate(cfg)


if __name__ == "__main__":
    main()

"""Train a student: ``python -m transkd.train +experiment=acdc``."""

from typing import TYPE_CHECKING

from transkd.cli import hydra_command
from transkd.settings import TrainSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra_command("train", TrainSettings)
def main(cfg: "DictConfig") -> None:
    """Run the training; torch and Lightning are imported only after the configuration has been checked."""
    from transkd.run import run

    run(cfg)


if __name__ == "__main__":
    main()

"""Score a network: ``python -m transkd.evaluate weights=student.safetensors +experiment=acdc protocol=full-res``."""

from typing import TYPE_CHECKING

from transkd.cli import hydra_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra_command("evaluate")
def main(cfg: "DictConfig") -> None:
    """Compose, then hand over; heavy imports come only once the configuration stands."""
    from transkd.run import evaluate

    evaluate(cfg)


if __name__ == "__main__":
    main()

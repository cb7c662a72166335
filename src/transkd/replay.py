"""Compute a step again whose loss was not finite: ``python -m transkd.replay outputs/acdc/<run>``."""

import argparse
from pathlib import Path

from transkd.cli import plain_command

__all__ = ["main"]


def main() -> None:
    """Print what the step had, and what it gives now."""
    parser = argparse.ArgumentParser(prog="python -m transkd.replay", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, or its not_finite.pt")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute")
    arguments = parser.parse_args()
    with plain_command():
        import torch  # after the arguments: --help does not wait for it

        from transkd.training.replaying import replay

        print("\n".join(replay(arguments.run, torch.device(arguments.device))))


if __name__ == "__main__":
    main()

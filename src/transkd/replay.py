"""Compute a step again whose loss was not finite: ``python -m transkd.replay outputs/acdc/<run>``."""

import argparse
import sys
from pathlib import Path

from transkd.errors import UserError

__all__ = ["main"]


def main() -> None:
    """Print what the step had, and what it gives now."""
    parser = argparse.ArgumentParser(prog="python -m transkd.replay", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, or its not_finite.pt")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute")
    arguments = parser.parse_args()
    import torch  # after the arguments: --help does not wait for it

    from transkd.training.replaying import replay

    try:
        lines = replay(arguments.run, torch.device(arguments.device))
    except UserError as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

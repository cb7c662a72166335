"""Check a training before it starts: ``python -m transkd.check +experiment=acdc data.root=ACDC``."""

import sys
from typing import TYPE_CHECKING

from transkd.cli import hydra_command
from transkd.settings import CheckSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra_command("check", CheckSettings)
def main(cfg: "DictConfig") -> None:
    """Run the check; torch is imported only after the configuration has been checked. Exit status 1 for a problem."""
    from transkd.training.checking import check

    if check(cfg).problems:
        sys.exit(1)


if __name__ == "__main__":
    main()

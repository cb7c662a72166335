"""Removal of what killed runs left half written."""

import logging
import re
from pathlib import Path

from transkd.files import is_being_written

__all__ = ["remove_leftovers"]

log = logging.getLogger(__name__)

# Temporary files of `write_atomically`: a dot, the file's name, a dot, eight characters.
TEMPORARY = re.compile(r"\.(last\.ckpt|best\.ckpt|student\.safetensors|teacher\.safetensors|results\.json)\.\w{8}")
DEPTHS = ("*", "*/*", "*/*/*")


def remove_leftovers(experiment: Path) -> None:
    """Remove temporary files in the runs of an experiment, except those that a living process writes.

    Args:
        experiment: folder of runs, such as ``outputs/demo``; runs of sweeps lie one level deeper.
    """
    for folder in (folder for depth in DEPTHS for folder in experiment.glob(depth)):
        run = folder.parent if folder.name == "checkpoints" else folder
        if not (run / "config.yaml").is_file():
            continue
        for path in folder.glob(".*"):
            if TEMPORARY.fullmatch(path.name) and not is_being_written(path):
                path.unlink(missing_ok=True)
                log.info("removed %s, which a killed run had left half written", path)

"""Removal of what killed runs left half written."""

import logging
import re
from pathlib import Path

from transkd.files import is_being_written

__all__ = ["remove_leftovers", "runs_of"]

log = logging.getLogger(__name__)

# Temporary files of `write_atomically`: a dot, the file's name, a dot, eight characters.
NAMES = r"last\.ckpt|best\.ckpt|(student|teacher)\.safetensors|results\.json|config\.yaml|not_finite(_rank\d+)?\.pt"
TEMPORARY = re.compile(rf"\.({NAMES})\.\w{{8}}")


def remove_leftovers(run: Path) -> None:
    """Remove temporary files in the folder of a run, except those that a living process writes."""
    for folder in (run, run / "checkpoints"):
        for path in folder.glob(".*"):
            if TEMPORARY.fullmatch(path.name) and not is_being_written(path):
                path.unlink(missing_ok=True)
                log.info("removed %s, which a killed run had left half written", path)


def runs_of(experiment: str) -> list[Path]:
    """Folders of the runs of an experiment in ``outputs/``, and of the jobs of its sweeps."""
    folder = Path("outputs") / experiment
    return [path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.yaml")]

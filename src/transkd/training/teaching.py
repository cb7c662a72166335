"""Find, load and check the teacher's weights."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transkd.data import SegmentationDataModule
from transkd.errors import UserError
from transkd.files import sha256, write_atomically
from transkd.metrics import Scores
from transkd.models import MappedClasses, Network, load_weights
from transkd.models.class_map import unmapped
from transkd.models.storage.lineage import check_license_policy
from transkd.models.storage.sources import read_weights
from transkd.settings import TeacherSettings
from transkd.training.agreement import warn_of_moved_classes

__all__ = ["can_be_scored", "check_kept", "check_scores", "keep", "kept_teacher", "load_teacher", "shaping"]

log = logging.getLogger(__name__)

# Arguments of Lightning's Trainer that do not change what a teacher of a number of epochs learns.
SHAPELESS = (
    "_target_", "default_root_dir", "accelerator", "max_epochs", "logger", "callbacks", "enable_progress_bar",
    "enable_model_summary", "enable_checkpointing", "log_every_n_steps", "num_sanity_val_steps", "profiler",
    "check_val_every_n_epoch", "val_check_interval", "limit_val_batches", "inference_mode", "benchmark",
    "detect_anomaly", "plugins",
)  # fmt: skip


def shaping(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the Trainer that change what a teacher learns; those that are null count as not given.

    Example:
        >>> shaping({"max_epochs": 3, "precision": "32-true", "limit_train_batches": None, "fast_dev_run": True})
        {'precision': '32-true', 'fast_dev_run': True}
    """
    return {name: value for name, value in trainer.items() if name not in SHAPELESS and value is not None}


def kept_teacher(settings: TeacherSettings, experiment: str, name: str, recipe: Sequence[Any]) -> Path:
    """Path of a teacher trained within a run, shared with later runs of the same recipe.

    Args:
        settings: the teacher's settings.
        experiment: name of the run.
        name: name of the network.
        recipe: plain values of everything that its training depends on; the file name contains their hash.

    Raises:
        UserError: neither a file of weights nor a number of epochs to train for is given.
    """
    if not settings.fit.max_epochs:
        raise UserError(
            "the run needs a teacher, for its terms or the student's start, but teacher.weights is not given: name the "
            "file with teacher.weights=PATH, train it first with teacher.fit.max_epochs=N, or train the student alone "
            "with distill=none"
        )
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return Path(settings.fit.folder) / f"{experiment}_{name}_{key}.safetensors"


def keep(trained: Path, kept: Path) -> Path:
    """Move a trained and scored teacher to where later runs find it, beside its hash; return where it is.

    It stays where it is if another run has kept its own in the meantime.
    """
    if kept.exists():
        return trained
    content = trained.read_bytes()
    write_atomically(_hash_file(kept), f"{hashlib.sha256(content).hexdigest()}  {kept.name}\n".encode())
    write_atomically(kept, content)
    trained.unlink()
    log.info("teacher: kept as %s; later runs with the same settings use it", kept)
    return kept


def check_kept(kept: Path) -> None:
    """Compare a kept teacher with the hash beside it.

    Raises:
        UserError: they differ, or there is none.
    """
    file = _hash_file(kept)
    stated = file.read_text(encoding="utf-8").split()[:1] if file.is_file() else []
    if stated != [sha256(kept)]:
        raise UserError(
            f"the kept teacher {kept} is damaged: its SHA-256 is not the one in {file.name} beside it; remove both "
            "files to train it again, or give another teacher with teacher.weights=PATH"
        )


def _hash_file(kept: Path) -> Path:
    return kept.with_name(f"{kept.name}.sha256")


def load_teacher(
    network: Network, source: str | Path, license: str | None, license_policy: str, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """Load the teacher's weights; return their description for checkpoints and results.

    Args:
        network: the teacher.
        source: its weights, see ``read_weights``.
        license: licence of the weights, if the file does not state one.
        license_policy: see ``check_license_policy``.
        classes: names of the data's classes; a warning says which the weights have at other ids.
    """
    weights = read_weights(source)
    load_weights(unmapped(network), weights, license=license)
    if not isinstance(network, MappedClasses):
        warn_of_moved_classes(weights.card, classes, f"the teacher {source}", "Map them with teacher.class_map")
    check_license_policy(network.lineage, license_policy, f"the teacher {network.name}")
    about = {"teacher_weights": str(source), "teacher_sha256": sha256(source), "teacher_name": network.name}
    return {**about, "teacher_classes": network.sources} if isinstance(network, MappedClasses) else about


def can_be_scored(network: Network, data: SegmentationDataModule) -> bool:
    """Whether the teacher has the data's number of classes; logs it if not."""
    if network.num_classes == data.num_classes:
        return True
    log.info("teacher: not evaluated, since it has %d classes and the data %d", network.num_classes, data.num_classes)
    return False


def check_scores(scores: Scores, protocol: str, min_miou: float, where: str = "the validation split") -> None:
    """Log the teacher's score on the validation split or a part of it.

    Raises:
        UserError: the mIoU is below ``teacher.min_miou`` or NaN.
    """
    log.info("teacher: mIoU %.2f %% (%s)", 100 * scores.miou, protocol)
    if not scores.miou >= min_miou:  # also true for NaN
        raise UserError(
            f"the teacher reaches only mIoU {scores.miou:.3f} on {where}, below "
            f"teacher.min_miou={min_miou}: wrong weights, classes or normalisation? "
            "Lower teacher.min_miou if that is intended"
        )

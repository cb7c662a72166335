"""Find, load and check the teacher's weights."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transkd.data import SegmentationDataModule
from transkd.errors import UserError
from transkd.files import sha256
from transkd.metrics import Scores
from transkd.models import MappedClasses, Network, load_weights
from transkd.models.class_map import unmapped
from transkd.models.storage.lineage import check_license_policy
from transkd.settings import TeacherSettings

__all__ = ["can_be_scored", "check_scores", "kept_teacher", "load_teacher"]

log = logging.getLogger(__name__)


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


def load_teacher(network: Network, source: str | Path, license: str | None, license_policy: str) -> dict[str, Any]:
    """Load the teacher's weights; return their description for checkpoints and results."""
    load_weights(unmapped(network), source, license=license)
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

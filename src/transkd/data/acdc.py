"""ACDC: adverse conditions with correspondences (Sakaridis et al., arXiv 2104.13395), the 19 Cityscapes classes."""

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from transkd.data.listing import Pair, elsewhere, pair_by_name
from transkd.errors import UserError

__all__ = ["CONDITIONS", "find_acdc"]

log = logging.getLogger(__name__)

CONDITIONS = ("fog", "night", "rain", "snow")
LAYOUT = (
    "rgb_anon/<fog|night|rain|snow>/<train|val>/<sequence>/<name>_rgb_anon.png beside "
    "gt/<condition>/<split>/<sequence>/<name>_gt_labelTrainIds.png"
)


def find_acdc(root: str | Path, split: str, conditions: Sequence[str] = CONDITIONS) -> list[Pair]:
    """Find images and labels of a split, in the layout of ``rgb_anon_trainvaltest.zip`` and ``gt_trainval.zip``.

    Args:
        root: folder that holds ``rgb_anon/`` and ``gt/``.
        split: "train" (1600 images) or "val" (406).
        conditions: any of fog, night, rain and snow, or another folder of the same layout; each once.

    Raises:
        UserError: the folder does not have that layout, an image or label has no counterpart, or a condition is unknown
            or named twice.
    """
    root = Path(root)
    _check_conditions(conditions, root)
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for condition in conditions:
        for found, folder, suffix in (
            (images, "rgb_anon", "_rgb_anon.png"),
            (labels, "gt", "_gt_labelTrainIds.png"),
        ):
            base = root / folder / condition / split
            for path in base.glob(f"*/*{suffix}"):
                found[f"{condition}/{path.relative_to(base).as_posix().removesuffix(suffix)}"] = path
    if not images and not labels:
        raise UserError(
            f"no ACDC images under data.root={root}: expected {LAYOUT}. "
            "Get the data set from acdc.vision.ee.ethz.ch, or try +experiment=demo, which generates its data"
            + elsewhere(root, "rgb_anon", "gt")
        )
    absent = [condition for condition in conditions if not any(key.startswith(f"{condition}/") for key in images)]
    if absent:
        log.warning("data.root=%s has no %s images of %s; they are left out", root, split, ", ".join(absent))
    return pair_by_name(images, labels)


def _check_conditions(conditions: Sequence[str], root: Path) -> None:
    if not conditions:
        raise UserError(f"data.find.conditions=[]: expected at least one of {', '.join(CONDITIONS)}")
    for i, condition in enumerate(conditions):
        if condition in conditions[:i]:
            raise UserError(f"data.find.conditions=[{','.join(conditions)}]: {condition} is named twice")
        if condition not in CONDITIONS and not (root / "rgb_anon" / condition).is_dir():
            near = get_close_matches(condition, CONDITIONS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"data.find.conditions=[{','.join(conditions)}]: there is no condition {condition}; {hint}"
                f"There are: {', '.join(CONDITIONS)}"
            )

"""What a file of weights says of its classes and its validation, compared with the data's."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transkd.errors import UserError
from transkd.models.storage.resizing import Step, resize_steps

__all__ = ["moved_classes", "other_validation", "warn_of_moved_classes"]

log = logging.getLogger(__name__)


def warn_of_moved_classes(card: Mapping[str, Any], names: Sequence[str], what: str, advice: str) -> None:
    """Log a warning if classes that both have stand at other ids; their number agrees, so nothing else would show it.

    Args:
        card: description in the file of weights.
        names: names of the data's classes.
        what: the weights, for the message.
        advice: what to do, for the message.
    """
    moved = moved_classes(card.get("class_names") or (), names)
    if moved:
        shown = ", ".join(moved[:3]) + (f" and {len(moved) - 3} more" if len(moved) > 3 else "")
        log.warning("%s has classes at other ids than the data: %s. %s", what, shown, advice)


def moved_classes(theirs: Sequence[str], ours: Sequence[str]) -> list[str]:
    """Classes that occur in both lists, and at other ids.

    Example:
        >>> moved_classes(["road", "car", "sky"], ["car", "road", "heaven"])
        ['road (its 0, our 1)', 'car (its 1, our 0)']
    """
    places = {name: i for i, name in enumerate(ours)}
    return [f"{name} (its {i}, our {places[name]})" for i, name in enumerate(theirs) if places.get(name, i) != i]


def other_validation(card: Mapping[str, Any], transform: Any) -> str | None:
    """How the validation of the run that wrote the weights resized images, if the data's does it otherwise.

    Args:
        card: description in a file of weights of ours.
        transform: ``data.eval_transform``.

    Returns:
        Both, for a message; None if they agree, or if one of them does more than to resize.
    """
    if "eval_transform" not in card:
        return None
    try:
        theirs, ours = _steps(card["eval_transform"]), _steps(transform.to_dict() if transform is not None else None)
    except UserError:
        return None
    return None if theirs == ours else f"{_describe(theirs)}, data.eval_transform is {_describe(ours)}"


def _steps(transform: Any) -> list[Step]:
    return [] if transform is None else resize_steps(transform)


def _describe(steps: Sequence[Step]) -> str:
    """Steps by the arguments that are sizes.

    Example:
        >>> _describe([("SmallestMaxSize", {"max_size": 512, "interpolation": 1, "p": 1.0})])
        'SmallestMaxSize(max_size=512)'
    """
    shown = []
    for name, values in steps:
        sizes = [f"{key}={value}" for key, value in values.items() if key not in ("p", "interpolation") and value]
        shown.append(f"{name}({', '.join(sizes)})")
    return ", ".join(shown) or "none"

"""Report of an initialisation: how similar the student is to its teacher before training."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from transkd.layers.upsampling import upsampled
from transkd.models.inherit.fits import Gram
from transkd.models.network import Network

__all__ = ["InheritReport", "compare"]


@dataclasses.dataclass(frozen=True)
class InheritReport:
    """How a student was initialised from its teacher, and how similar they are.

    Attributes:
        how: "solve", "select" or "copy".
        images: number of images used, without mirror images.
        seconds: duration, including the comparison.
        feature_errors: per stage, the share of the variance of the teacher's features that no linear map of the
            student's explains, in [0, 1]. Empty without images.
        agreement: share of pixels with the same argmax of both networks' logits; None without images or if the classes
            differ.
        warnings: logged warnings.

    Example:
        >>> InheritReport("copy", 0, 0.1).as_dict()["how"]
        'copy'
    """

    how: str
    images: int
    seconds: float
    feature_errors: tuple[float, ...] = ()
    agreement: float | None = None
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for the log."""
        words = {"solve": "solved from", "select": "a subset of the weights of", "copy": "a copy of"}[self.how]
        parts = [f"{words} the teacher in {self.seconds:.0f} s, {self.images} images"]
        if self.feature_errors:
            parts.append(f"relative error of the features {', '.join(f'{error:.3f}' for error in self.feature_errors)}")
        if self.agreement is not None:
            parts.append(f"{100 * self.agreement:.1f} % of the pixels as the teacher has them")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            **dataclasses.asdict(self),
            "seconds": round(self.seconds, 2),
            "feature_errors": list(self.feature_errors),
            "warnings": list(self.warnings),
        }


@torch.no_grad()
def compare(
    teacher: Network, student: Network, batches: Iterable[Tensor], advance: Callable[[], None]
) -> tuple[int, tuple[float, ...], float | None]:
    """``images``, ``feature_errors`` and ``agreement`` of the report, over batches of images."""
    grams: list[Gram] = []
    count, same, of = 0, 0, 0
    for images in batches:
        count += len(images)
        theirs, ours = teacher(images), student(images)
        grams = grams or [Gram() for _ in range(min(len(theirs.features), len(ours.features)))]
        for gram, feature, target in zip(grams, ours.features, theirs.features, strict=False):
            gram.add(upsampled(feature, target.shape[-2:]), target)
        if theirs.logits is not None and ours.logits is not None and teacher.num_classes == student.num_classes:
            logits = upsampled(ours.logits, theirs.logits.shape[-2:])
            same += int((logits.argmax(1) == theirs.logits.argmax(1)).sum())
            of += theirs.logits[:, 0].numel()
        advance()
    return count, tuple(_unexplained(gram) for gram in grams), same / of if of else None


def _unexplained(gram: Gram) -> float:
    weight, _ = gram.solve(ridge=1e-9)
    _, shared, variance = gram.centred()
    total = float(variance.sum())
    return max(0.0, 1 - float((weight * shared.T).sum()) / total) if total > 0 else 0.0

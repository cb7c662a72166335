"""Named, weighted terms: the one place that knows the weights."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses._checks import check_needs
from transkd.outputs import EVERYTHING, SegmentationOutput

__all__ = ["Criterion", "CriterionOutput"]

ENTRY_KEYS = {"term", "weight"}


class CriterionOutput(NamedTuple):
    """What a criterion gives for one batch.

    Attributes:
        total: Σ weight · value, a scalar to minimise.
        values: each computed term's own scalar by its name, before the weight.
    """

    total: Tensor
    values: dict[str, Tensor]


class Criterion(nn.Module):
    """Hold terms by name, compute each once, and weigh them: ``total = Σ weight · value``.

    A term of weight 0 is not computed and its parameters are frozen, so that nothing waits for their
    gradients.

    Args:
        terms: for each name ``{"term": module, "weight": number}``, the weight finite and at least 0.

    Attributes:
        weights: each term's weight by name.
        needs: what the computed terms read of the teacher; empty when no teacher is needed.

    Raises:
        UserError: an entry is not of that form; when called, no term is computed or an output lacks what a
            term reads.

    Example:
        >>> from transkd.losses.cross_entropy import TaskCrossEntropy
        >>> criterion = Criterion({"task": {"term": TaskCrossEntropy(), "weight": 2.0}})
        >>> student = SegmentationOutput(torch.zeros(1, 4, 2, 2), (), (), torch.rand(1, 3, 8, 8))
        >>> criterion(student, None, torch.zeros(1, 8, 8, dtype=torch.int64))
        CriterionOutput(total=tensor(2.7726), values={'task': tensor(1.3863)})
    """

    def __init__(self, terms: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        for name, entry in terms.items():
            _check_entry(name, entry)
        self.terms = nn.ModuleDict({name: entry["term"] for name, entry in terms.items()})
        self.weights = {name: float(entry["weight"]) for name, entry in terms.items()}
        for name, term in self.terms.items():
            if self.weights[name] == 0:
                term.requires_grad_(False)
        self.needs: frozenset[str] = frozenset().union(*(_needs(term) for _, term in self._computed()))

    def forward(
        self,
        student: SegmentationOutput,
        teacher: SegmentationOutput | None = None,
        target: Tensor | None = None,
    ) -> CriterionOutput:
        """Compute each term whose weight is not 0."""
        values: dict[str, Tensor] = {}
        for name, term in self._computed():
            try:
                check_needs(term, _needs(term), student, teacher)
                values[name] = term(student, teacher, target)
            except UserError as error:
                raise UserError(f"Term {name!r}: {error}") from error
        if not values:
            raise UserError(
                f"The criterion has nothing to compute; its weights are {self.weights}. "
                "Give at least one term, such as task, a weight above 0."
            )
        total = torch.stack([self.weights[name] * value for name, value in values.items()]).sum()
        return CriterionOutput(total, values)

    def _computed(self) -> list[tuple[str, nn.Module]]:
        return [(name, term) for name, term in self.terms.items() if self.weights[name] != 0]


def _needs(term: nn.Module) -> frozenset[str]:
    return frozenset(getattr(term, "needs", ()))


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    if "." in name or hasattr(nn.ModuleDict(), name):
        raise UserError(f"A term cannot be called {name!r}: the name has a dot or is PyTorch's own. Choose another.")
    _check_keys(name, entry)
    term, weight = entry["term"], entry["weight"]
    if not isinstance(term, nn.Module) or not isinstance(getattr(term, "needs", None), frozenset):
        raise UserError(
            f"Term {name!r} must be a torch module with a class attribute `needs`, a frozenset of what it "
            f"reads of the teacher; got {type(term).__name__}."
        )
    if not _needs(term) <= EVERYTHING:
        raise UserError(f"Term {name!r} needs {sorted(_needs(term))}; a network shows only {sorted(EVERYTHING)}.")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"Term {name!r} must have a finite weight of at least 0; got {weight!r}.")


def _check_keys(name: str, entry: object) -> None:
    got = set(entry) if isinstance(entry, Mapping) else {repr(entry)}
    faults = [f"unknown {key!r}" for key in sorted(got - ENTRY_KEYS)]
    faults += [f"missing {key!r}" for key in sorted(ENTRY_KEYS - got)]
    if faults:
        raise UserError(f"Term {name!r} must have exactly the keys 'term' and 'weight': {', '.join(faults)}.")

"""Weighted sum of named terms; the only module that handles weights."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.gradients import gradient_norm
from transkd.losses.schedule import Progress, Schedule
from transkd.losses.shared.checks import check_needs
from transkd.losses.shared.grids import connected_zero
from transkd.outputs import EVERYTHING, SegmentationOutput

__all__ = ["Criterion", "CriterionOutput"]

logger = logging.getLogger("transkd.losses")

REQUIRED, OPTIONAL = {"term", "weight"}, {"schedule"}
AUTO = re.compile(r"auto\((.+)\)")
CALIBRATION_STEPS = 10
_OFF_AT_FIRST = "Term {!r}: auto(s) is calibrated on the first steps, so its schedule must be on there."


class CriterionOutput(NamedTuple):
    """Result of a criterion for one batch.

    Attributes:
        total: Σ weight · schedule · value, the scalar to minimise.
        values: unweighted value of each computed term by name.
    """

    total: Tensor
    values: dict[str, Tensor]


class Criterion(nn.Module):
    """Weighted sum of terms: ``total = Σ weight · schedule · value``.

    A term of weight 0 is not computed and its parameters are frozen, because distributed training expects a gradient
    for every trainable parameter. A term is not computed either while its schedule is 0, and does not need the teacher
    then.

    A weight of ``auto(s)`` is calibrated on the first 10 training steps: it is the mean of ``s·‖∇task‖ / ‖∇term‖`` over
    them, gradients with respect to the student's parameters, and is constant afterwards. It is part of the
    ``state_dict``. A step at which any automatic term has a zero or non-finite gradient is skipped for all of them; a
    warning is logged after ten such steps.

    Args:
        terms: ``{"term": module, "weight": number or "auto(s)", "schedule": Schedule}`` by name; numbers are finite and
            at least 0, the schedule is optional.

    Attributes:
        weights: weight of each term by name; None for an automatic weight before the first calibration step.
        needs: teacher outputs that the terms read at this step; empty if none needs the teacher.
        ever_needs: teacher outputs that the terms read at any step of the run.
        calibrating: whether ``parameters`` must be passed for the calibration of automatic weights.

    Raises:
        UserError: an entry is malformed; when called, if no term is computed or an output that a term reads is
            missing.

    Example:
        >>> from transkd.losses.cross_entropy import TaskCrossEntropy
        >>> criterion = Criterion({"task": {"term": TaskCrossEntropy(), "weight": 2.0}})
        >>> student = SegmentationOutput(torch.zeros(1, 4, 2, 2), (), (), torch.rand(1, 3, 8, 8))
        >>> criterion(student, None, torch.zeros(1, 8, 8, dtype=torch.int64))
        CriterionOutput(total=tensor(2.7726), values={'task': tensor(1.3863)})
    """

    auto_sums: Tensor
    auto_steps: Tensor

    def __init__(self, terms: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        for name, entry in terms.items():
            _check_entry(name, entry)
        self.terms = nn.ModuleDict({name: entry["term"] for name, entry in terms.items()})
        self.shares = {name: share for name, entry in terms.items() if (share := _share(entry["weight"])) is not None}
        self.fixed = {name: float(entry["weight"]) for name, entry in terms.items() if name not in self.shares}
        self.schedules = {name: entry["schedule"] for name, entry in terms.items() if entry.get("schedule") is not None}
        self.factors = dict.fromkeys(terms, 1.0)
        for name, term in self.terms.items():
            if self.fixed.get(name) == 0:
                term.requires_grad_(False)
        if self.shares:
            if "task" not in terms or not self.fixed.get("task"):
                raise UserError("A weight of auto(s) is relative to the task: the term 'task' must have a weight.")
            self.register_buffer("auto_sums", torch.zeros(len(self.shares), dtype=torch.float64))
            self.register_buffer("auto_steps", torch.tensor(0))
        self._calibrated = not self.shares  # cached on the host: reading auto_steps synchronises with the device
        self._skipped_steps = 0
        self.register_load_state_dict_post_hook(_recompute_calibrated)  # type: ignore[no-untyped-call]

    @property
    def weights(self) -> dict[str, float | None]:
        """Weight of each term by name, without its schedule."""
        known = bool(self.shares) and int(self.auto_steps) > 0
        means = (self.auto_sums / self.auto_steps).tolist() if known else [None] * len(self.shares)
        automatic = dict(zip(self.shares, means, strict=True))
        return {name: automatic[name] if name in automatic else self.fixed[name] for name in self.terms}

    @property
    def needs(self) -> frozenset[str]:
        """Teacher outputs that the terms read at this step."""
        return frozenset().union(*(_needs(term) for _, term in self._computed()))

    @property
    def ever_needs(self) -> frozenset[str]:
        """Teacher outputs that the terms read at any step of the run."""
        return frozenset().union(*(_needs(term) for _, term in self._weighted()))

    @property
    def calibrating(self) -> bool:
        """Whether automatic weights are still being calibrated."""
        if not self._calibrated and self.training:
            self._calibrated = int(self.auto_steps) >= CALIBRATION_STEPS
        return not self._calibrated and self.training

    def check_schedules(self, steps: int, epochs: float) -> None:
        """Check that every schedule is above 0 at some step of a run of that length.

        Raises:
            UserError: a schedule is not, or is 0 at the first step although the weight is automatic.
        """
        for name in self.schedules:
            if name in self.shares and self._factor(name, Progress(0, steps, epochs)) == 0:
                raise UserError(_OFF_AT_FIRST.format(name))
            if not any(self._factor(name, Progress(step, steps, epochs)) for step in range(steps)):
                raise UserError(
                    f"Term {name!r}: {self.schedules[name]} never turns on at a step of a run of {epochs:g} epochs and "
                    f"{steps} steps. Move or widen it, or leave the term out."
                )

    def advance(self, progress: Progress) -> None:
        """Update the schedule factors; call it before each step."""
        for name in self.schedules:
            self.factors[name] = self._factor(name, progress)

    def _factor(self, name: str, progress: Progress) -> float:
        try:
            return self.schedules[name](progress)
        except UserError as error:
            raise UserError(f"Term {name!r}: {error}") from error

    def forward(
        self,
        student: SegmentationOutput,
        teacher: SegmentationOutput | None = None,
        target: Tensor | None = None,
        parameters: Sequence[nn.Parameter] = (),
    ) -> CriterionOutput:
        """Compute the terms whose weight and schedule are not 0; ``parameters`` are the student's, for calibration."""
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
        if self.calibrating and torch.is_grad_enabled():
            self._calibrate(values, parameters)
        scales = self._scales()
        total = torch.stack([_scaled(value, scales[name]) for name, value in values.items()])
        return CriterionOutput(total.sum() + self._idle(), values)

    def _scales(self) -> dict[str, Tensor | float]:
        """Weight · schedule by name; automatic weights stay on the device, 0 before the first calibration step."""
        weights: dict[str, Tensor | float] = dict(self.fixed)
        if self.shares:
            means = self.auto_sums / self.auto_steps.clamp_min(1)
            weights.update(zip(self.shares, means.unbind(), strict=True))
        return {name: weight * self.factors[name] for name, weight in weights.items()}

    def _calibrate(self, values: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            raise UserError("A weight of auto(s) needs gradients: call the criterion with parameters=the student's.")
        absent = sorted(self.shares.keys() - values.keys())
        if absent:
            raise UserError(_OFF_AT_FIRST.format(absent[0]))
        task = self.fixed["task"] * gradient_norm(values["task"], parameters)
        norms = torch.stack([gradient_norm(values[name], parameters) for name in self.shares])
        shares = torch.tensor(list(self.shares.values()), dtype=torch.float64, device=norms.device)
        ratios = shares * task.double() / norms.double()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(ratios)
            ratios /= torch.distributed.get_world_size()
        finite = ratios.isfinite().tolist()
        if all(finite):
            self.auto_sums += ratios
            self.auto_steps += 1
            return
        self._skipped_steps += 1  # skip: with a zero gradient the ratio is undefined
        if self._skipped_steps == CALIBRATION_STEPS:
            names = [name for name, known in zip(self.shares, finite, strict=True) if not known]
            logger.warning(
                "No automatic weight could be calibrated in %d steps, so all of them are 0: the gradient on the "
                "student is zero or not finite for %s. Check what these terms read, or give them numbers as weights.",
                CALIBRATION_STEPS,
                ", ".join(names),
            )

    def _idle(self) -> Tensor | float:
        """Return a 0 connected to the parameters of terms whose schedule is 0.

        Distributed data-parallel training requires a gradient for every trainable parameter.
        """
        idle = [p for name, term in self._weighted() if self.factors[name] == 0 for p in term.parameters()]
        return connected_zero(*idle) if idle else 0.0

    def _weighted(self) -> list[tuple[str, nn.Module]]:
        return [(name, term) for name, term in self.terms.items() if self.fixed.get(name) != 0]

    def _computed(self) -> list[tuple[str, nn.Module]]:
        return [(name, term) for name, term in self._weighted() if self.factors[name] != 0]


def _recompute_calibrated(criterion: nn.Module, incompatible_keys: object) -> None:
    """Discard the value cached on the host, as ``auto_steps`` was loaded."""
    assert isinstance(criterion, Criterion)
    criterion._calibrated = not criterion.shares


def _needs(term: nn.Module) -> frozenset[str]:
    return frozenset(getattr(term, "needs", ()))


def _scaled(value: Tensor, scale: Tensor | float) -> Tensor:
    """Multiply without promoting the value to the float64 of a scale tensor."""
    return value * (scale.to(value.dtype) if isinstance(scale, Tensor) else scale)


def _share(weight: object) -> float | None:
    """Parse the s of ``auto(s)``; None for any other weight, NaN if s is not a number."""
    match = AUTO.fullmatch(weight) if isinstance(weight, str) else None
    try:
        return float(match[1]) if match else None
    except ValueError:
        return math.nan


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    if "." in name or hasattr(nn.ModuleDict(), name):
        raise UserError(
            f"A term cannot be called {name!r}: the name has a dot or is an attribute of nn.ModuleDict. Choose another."
        )
    _check_keys(name, entry)
    term, weight, share = entry["term"], entry["weight"], _share(entry["weight"])
    if not isinstance(term, nn.Module) or not isinstance(getattr(term, "needs", None), frozenset):
        raise UserError(
            f"Term {name!r} must be a torch module with a class attribute `needs`, a frozenset of the "
            f"teacher outputs that it reads; got {type(term).__name__}."
        )
    if not _needs(term) <= EVERYTHING:
        raise UserError(f"Term {name!r} needs {sorted(_needs(term))}; networks return only {sorted(EVERYTHING)}.")
    if share is not None and (name == "task" or not 0 < share < math.inf):
        raise UserError(
            f"Term {name!r}: auto(s) requires s > 0 and cannot be used for the task itself; got {weight!r}."
        )
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if share is None and not (number and math.isfinite(weight) and weight >= 0):
        raise UserError(f"Term {name!r} must have a finite weight of at least 0, or auto(s); got {weight!r}.")
    schedule = entry.get("schedule")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise UserError(f"Term {name!r}: schedule must be a transkd.losses.Schedule; got {type(schedule).__name__}.")


def _check_keys(name: str, entry: object) -> None:
    got = set(entry) if isinstance(entry, Mapping) else {repr(entry)}
    faults = [f"unknown {key!r}" for key in sorted(got - REQUIRED - OPTIONAL)]
    faults += [f"missing {key!r}" for key in sorted(REQUIRED - got)]
    if faults:
        raise UserError(f"Term {name!r} must have the keys 'term' and 'weight', and may have 'schedule': "
                        f"{', '.join(faults)}.")  # fmt: skip

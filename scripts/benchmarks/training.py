"""Training step as the Distiller computes it, and alternatives up to a reference implementation.

All alternatives compute the same loss and gradients, with the same student and criterion.
"""

import argparse
import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import measure
from benchmarks.forward import draw_out, drawn_out_attention, roughen
from transkd.cli import CONF
from transkd.command.explaining import explain
from transkd.errors import UserError
from transkd.layers.token_linear import TokenLinear
from transkd.losses import Criterion, cross_entropy
from transkd.models import FrozenTeacher, Network, SegformerHead, Segmenter
from transkd.outputs import EVERYTHING, SegmentationOutput
from transkd.settings import TrainSettings
from transkd.training.build import build_criterion, build_optimization, build_student, build_teacher
from transkd.training.compilation import compile_in_place
from transkd.training.device import Device

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative
# for compiled steps, compared as they are timed: TensorFloat-32 or bfloat16, and another order of summation
COMPILED_TOLERANCE = {torch.float32: (1e-3, 2e-2), torch.bfloat16: (1e-2, 1e-1)}
CORNER = (256, 512)  # crop of at most two images for comparing gradients

CHOICES = ("teacher-graph", "unfolded", "explicit-attention", "plain-layers", "plain-cross-entropy")
AGAINST = {"drawn-out": CHOICES, **{choice: (choice,) for choice in (*CHOICES, "checkpointing")}}
"""Names for ``--against`` and the choices that each combines; drawn-out is the reference implementation."""


# Networks and criterion, composed and built as by transkd.train


class Parts(NamedTuple):
    """Parts of a training step; the teacher is None if no term reads it."""

    student: Network
    teacher: Network | None
    criterion: Criterion
    optimizer: Optimizer | None

    def trained(self) -> list[nn.Parameter]:
        """Parameters of student and terms that require grad."""
        return [p for part in (self.student, self.criterion) for p in part.parameters() if p.requires_grad]


@contextlib.contextmanager
def mistakes_as_user_errors() -> Iterator[None]:
    """Convert errors of Hydra about names and values to one-line user errors."""
    try:
        yield
    except Exception as error:
        message = explain(error)
        if message is None or isinstance(error, UserError):
            raise
        raise UserError(message) from None


def compose_config(args: argparse.Namespace, distill: str, *overrides: str) -> DictConfig:
    """Compose the configuration of ``python -m transkd.train`` with these settings."""
    given = [f"student={args.student}", f"teacher={args.teacher}", f"distill={distill}", "run_dir=."]
    with mistakes_as_user_errors(), initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*given, *overrides])


def build_parts(cfg: DictConfig, device: torch.device, optimizer: bool = False) -> Parts:
    """Build networks with random weights and the criterion, in training mode, without dropout and stochastic depth.

    Biases and norms are randomised: with 0 and 1 an error in them would not show.
    """
    torch.manual_seed(0)
    with mistakes_as_user_errors():
        student = build_student(cfg, TrainSettings.read(cfg).student)
        teacher = build_teacher(cfg)
        criterion = build_criterion(cfg, student.channels, teacher.channels if teacher is not None else ())
    for network in filter(None, (student, teacher)):
        roughen(network)
    for part in filter(None, (student, teacher, criterion)):
        leave_nothing_out(part.train().to(device))
    accelerator = "cpu" if device.type == "cpu" else "auto"
    Device.choose(accelerator, channels_last=cfg.channels_last).lay_out(student, teacher, criterion)
    parts = Parts(student, teacher, criterion, None)
    return parts._replace(optimizer=build_optimization(cfg).build(parts.trained())) if optimizer else parts


def leave_nothing_out(module: nn.Module) -> None:
    """Disable dropout and stochastic depth, as their random numbers would differ between alternatives."""
    for part in module.modules():
        if isinstance(part, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            part.p = 0.0
        elif isinstance(part, DropPath):
            part.drop_prob = 0.0


def draw_batch(size: Sequence[int], batch: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images uint8 [B, 3, H, W] and labels int64 [B, H, W], a tenth of them 255."""
    image = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
    target = torch.randint(0, classes, (batch, *size))
    target[torch.rand(target.shape) < 0.1] = 255
    return image.to(device), target.to(device)


# Choices


class Unfolded(nn.Module):
    """Network with its SegFormer head computed as in the paper, with the same parameters."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, needs: Collection[str] = EVERYTHING) -> SegmentationOutput:
        """Run the network."""
        network = self.network
        image = network.normalise(image)
        features, embeddings = network.encoder.forward_stages(image)
        logits = draw_out(network.head, features) if "logits" in needs else None
        return SegmentationOutput(logits, features, embeddings, image)


@contextlib.contextmanager
def gradient_into(output: SegmentationOutput) -> Iterator[None]:
    """Make ``detach`` return the teacher's tensors unchanged, so that the backward pass includes the teacher."""
    shown = {id(tensor) for tensor in (output.logits, *output.features, *output.embeddings)}
    detach = Tensor.detach
    with mock.patch.object(Tensor, "detach", lambda tensor: tensor if id(tensor) in shown else detach(tensor)):
        yield


def plain_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor, ignore: int) -> Tensor:
    """Cross-entropy at the labels' size in plain PyTorch, on fully upsampled logits."""
    logits = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, target, weights, ignore_index=ignore)


# Step


class Step:
    """Training step: forward of both networks, criterion, backward, and the optimizer's step if there is one.

    Args:
        parts: shared by the alternatives, so that they have the same weights.
        choices: from ``CHOICES``; without any the step is that of ``Distiller``. ``teacher-graph`` does not freeze the
            teacher, computes its head and includes it in the backward pass; ``unfolded`` computes both decode heads as
            in the paper; ``explicit-attention`` holds each attention matrix in memory; ``plain-layers`` uses
            ``F.linear`` and contiguous weights; ``plain-cross-entropy`` upsamples all logits to the labels' size at
            once. ``checkpointing`` (not part of the reference implementation) recomputes the student's activations in
            the backward pass.
        compiled: mode of ``torch.compile`` for networks and terms, as in ``transkd.train``, in a copy of the parts;
            None does not compile.
        dtype: bfloat16 computes the step under autocast; weights keep their dtype.
        whole: compile each network as a whole, not in regions.
    """

    def __init__(
        self,
        parts: Parts,
        choices: Collection[str] = (),
        compiled: str | None = None,
        dtype: torch.dtype = torch.float32,
        whole: bool = False,
    ) -> None:
        if compiled or {"plain-layers", "checkpointing"} & set(choices):
            parts = copy.deepcopy(parts)
        if "checkpointing" in choices:
            parts.student.checkpoint_activations()
        if "plain-layers" in choices:
            for part in filter(None, parts[:3]):
                part.to(memory_format=torch.contiguous_format)
        self.parts, self.choices, self.dtype, self.compiled = parts, frozenset(choices), dtype, compiled
        student: nn.Module = parts.student
        teacher: nn.Module | None = parts.teacher
        if teacher is not None and "teacher-graph" in choices:
            teacher = copy.deepcopy(teacher).eval().requires_grad_()
        if "unfolded" in choices:
            student, teacher = Unfolded(student), teacher and Unfolded(teacher)
        self.student, self.criterion = student, parts.criterion
        if compiled:
            modules = filter(None, (student, teacher, *parts.criterion.terms.values()))
            compile_in_place(*modules, mode=compiled, whole=whole)
        graph = teacher is None or "teacher-graph" in choices
        self.teacher = teacher if graph else FrozenTeacher(teacher, cast_once=not compiled)

    def __call__(self, image: Tensor, target: Tensor) -> None:
        """Run the whole step and clear the gradients."""
        self.backward(self.loss(image, target))
        self.update()

    def loss(self, image: Tensor, target: Tensor, autocast: bool = True) -> Tensor:
        """Compute the criterion's total."""
        with contextlib.ExitStack() as stack:
            if autocast and self.dtype != torch.float32:
                stack.enter_context(torch.autocast(image.device.type, self.dtype))
            if self.compiled:
                torch.compiler.cudagraph_mark_step_begin()
            if "plain-layers" in self.choices:
                stack.enter_context(mock.patch.object(TokenLinear, "forward", nn.Linear.forward))
            if "plain-cross-entropy" in self.choices:
                stack.enter_context(mock.patch.object(cross_entropy, "upsampled_cross_entropy", plain_cross_entropy))
            if "explicit-attention" in self.choices:
                stack.enter_context(drawn_out_attention())
            student = self.student(image)
            teacher = self._ask_teacher(image)
            if teacher is not None and "teacher-graph" in self.choices:
                stack.enter_context(gradient_into(teacher))
            total: Tensor = self.criterion(student, teacher, target).total
        return total

    def _ask_teacher(self, image: Tensor) -> SegmentationOutput | None:
        needs = self.parts.criterion.needs
        if self.teacher is None or not needs:
            return None
        output: SegmentationOutput = self.teacher(image, EVERYTHING if "teacher-graph" in self.choices else needs)
        return output

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of all trained parameters."""
        loss.backward()

    def update(self) -> None:
        """Run the optimizer's step and clear the gradients."""
        if self.parts.optimizer is not None:
            self.parts.optimizer.step()
        for module in self.modules():
            module.zero_grad()

    def modules(self) -> list[nn.Module]:
        """Student, criterion and, if there is one, teacher."""
        return [module for module in (self.student, self.criterion, self.teacher) if module is not None]

    def gradients(self, image: Tensor, target: Tensor, autocast: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and the gradients of all trained parameters."""
        loss = self.loss(image, target, autocast)
        self.backward(loss)
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parts.trained()]
        for module in self.modules():
            module.zero_grad()
        return loss.detach().clone(), found

    @contextlib.contextmanager
    def repeatable(self, dtype: torch.dtype) -> Iterator[None]:
        """Convert weights to a dtype and fix the seed; restore dtype and the criterion's state afterwards."""
        state = copy.deepcopy(self.parts.criterion.state_dict())
        torch.manual_seed(0)
        try:
            for module in self.modules():
                module.to(dtype)
            yield
        finally:
            for module in self.modules():
                module.to(torch.float32)
            self.parts.criterion.load_state_dict(state)


def build_steps(parts: Parts, against: Sequence[str], compiled: str | None, dtype: torch.dtype) -> dict[str, Step]:
    """Build our step, then the alternatives by name."""
    for choice in (choice for name in against for choice in AGAINST[name]):
        check_choice(parts, choice)
    steps = {"ours": Step(parts, dtype=dtype)}
    if compiled:
        steps["ours" + measure.COMPILED] = Step(parts, compiled=compiled, dtype=dtype)
    return steps | {name: Step(parts, AGAINST[name], dtype=dtype) for name in against}


def check_choice(parts: Parts, choice: str) -> None:
    """Raise an error if a choice does not apply to these parts."""
    for network in filter(None, (parts.student, parts.teacher)):
        drawable = isinstance(network, Segmenter) and isinstance(network.head, SegformerHead)
        if choice == "unfolded" and not drawable:
            raise UserError(f"--against unfolded, drawn-out: {network.name} has no SegFormer head")
    if choice == "teacher-graph" and parts.teacher is None:
        raise UserError("--against teacher-graph, drawn-out: without distillation there is no teacher")


Outcome = tuple[Tensor, list[Tensor]]
"""Loss and gradients of a step."""


class Difference(NamedTuple):
    """Relative differences between a step and ours."""

    loss: float
    gradient: float  # norm over all gradients


def compare(steps: Mapping[str, Step], image: Tensor, target: Tensor) -> dict[str, Difference]:
    """Differences of each step from the first.

    Gradients are compared in float64: in float32 rounding decides the sign of about one ReLU input in a million. With
    random images and labels most gradients cancel, and this alone is up to 1e-3 of their norm. A compiled step is
    compared with ours as both are timed, since another dtype or size would be compiled again.

    Raises:
        UserError: a difference exceeds rounding errors, so timings would not be comparable.
    """
    height, width = CORNER
    corner, its_target = image[:2, :, :height, :width].double() / 255, target[:2, :height, :width]

    def exactly(step: Step) -> Outcome:
        with exact_products(), step.repeatable(torch.float32):
            loss = step.loss(image, target, autocast=False).detach()
        with step.repeatable(torch.float64):
            return loss, step.gradients(corner, its_target)[1]

    def as_timed(step: Step) -> Outcome:
        with step.repeatable(torch.float32):
            return step.gradients(image, target, autocast=True)

    ours, *others = steps
    exact = exactly(steps[ours])
    found = {ours: Difference(0.0, 0.0)}
    for name in others:
        step = steps[name]
        if step.compiled:
            found[name] = difference(as_timed(step), as_timed(steps[ours]))
            check_difference(name, found[name], *COMPILED_TOLERANCE[step.dtype])
        else:
            found[name] = difference(exactly(step), exact)
            check_difference(name, found[name])
    return found


def difference(found: Outcome, expected: Outcome) -> Difference:
    """Differences of loss and gradients, relative to the expected values."""
    loss = (found[0] - expected[0]).abs() / expected[0].abs()
    return Difference(loss.item(), (distance(found[1], expected[1]) / norm(expected[1])).item())


def check_difference(
    name: str, difference: Difference, loss: float = LOSS_TOLERANCE, gradient: float = GRADIENT_TOLERANCE
) -> None:
    """Raise an error if a step does not compute the same."""
    if not (difference.loss <= loss and difference.gradient <= gradient):
        raise UserError(
            f"{name} does not compute the same step: its loss is {difference.loss:.1e} away from ours and its "
            f"gradients {difference.gradient:.1e} (relative), expected at most {loss:.0e} and {gradient:.0e}; nothing "
            "was timed"
        )


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Disable TensorFloat-32, as its rounding errors would hide small mistakes."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all tensors."""
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Euclidean distance over all tensors."""
    return norm([one - other for one, other in zip(ours, theirs, strict=True)])


def add_step_options(parser: Any, several: bool) -> None:
    """Add options for networks and terms."""
    parser.add_argument("--teacher", default="segformer_b2", help="entry of conf/teacher")
    parser.add_argument("--student", default="segformer_b0", help="entry of conf/student")
    many: dict[str, Any] = {"nargs": "+", "default": ["transkd_base"]} if several else {"default": "transkd_base"}
    parser.add_argument("--distill", **many, help="entry of conf/distill" + (", one row each" if several else ""))
    parser.add_argument("--optimizer", action="store_true", help="include the optimizer's step (AdamW)")

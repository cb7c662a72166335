"""One training step as the distiller does it, and the same with the choices of a first implementation.

The alternatives differ in how the same loss and gradients are computed; they hold the same student and criterion.
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
from transkd.cli import CONF, explain
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
# of compiled steps, compared as they are timed: TensorFloat-32 or bfloat16, sums in another order
COMPILED_TOLERANCE = {torch.float32: (1e-3, 2e-2), torch.bfloat16: (1e-2, 1e-1)}
CORNER = (256, 512)  # of at most two images, on which gradients are compared

CHOICES = ("teacher-graph", "unfolded", "explicit-attention", "plain-layers", "plain-cross-entropy")
AGAINST = {"drawn-out": CHOICES, **{choice: (choice,) for choice in (*CHOICES, "checkpointing")}}
"""What ``--against`` names, and the choices that it stands for."""


# The networks and the criterion, as transkd.train composes and builds them.


class Parts(NamedTuple):
    """What a training step is made of; the teacher is None where no term reads one."""

    student: Network
    teacher: Network | None
    criterion: Criterion
    optimizer: Optimizer | None

    def trained(self) -> list[nn.Parameter]:
        """What the optimizer trains: the student and what the terms own."""
        return [p for part in (self.student, self.criterion) for p in part.parameters() if p.requires_grad]


@contextlib.contextmanager
def mistakes_as_user_errors() -> Iterator[None]:
    """A name or a value that Hydra does not take, in one line."""
    try:
        yield
    except Exception as error:
        message = explain(error)
        if message is None or isinstance(error, UserError):
            raise
        raise UserError(message) from None


def compose_config(args: argparse.Namespace, distill: str, *overrides: str) -> DictConfig:
    """The configuration of ``python -m transkd.train`` with these settings."""
    given = [f"student={args.student}", f"teacher={args.teacher}", f"distill={distill}", "run_dir=."]
    with mistakes_as_user_errors(), initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*given, *overrides])


def build_parts(cfg: DictConfig, device: torch.device, optimizer: bool = False) -> Parts:
    """Networks at random weights and the criterion, in training mode, without dropout and stochastic depth.

    Every network is roughened: a bias or norm in the wrong place would go unseen at 0 and 1.
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
    return parts._replace(optimizer=build_optimization(cfg).optimizer(parts.trained())) if optimizer else parts


def leave_nothing_out(module: nn.Module) -> None:
    """No dropout and no stochastic depth: they would be drawn differently in each alternative."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        elif isinstance(part, DropPath):
            part.drop_prob = 0.0


def draw_batch(size: Sequence[int], batch: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images uint8 [B, 3, H, W] and labels int64 [B, H, W], a tenth of them 255."""
    image = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
    target = torch.randint(0, classes, (batch, *size))
    target[torch.rand(target.shape) < 0.1] = 255
    return image.to(device), target.to(device)


# The choices.


class Unfolded(nn.Module):
    """A network whose SegFormer head is computed as its paper draws it, with the head's own parameters."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, needs: Collection[str] = EVERYTHING) -> SegmentationOutput:
        """What the network shows."""
        network = self.network
        image = network.normalise(image)
        features, embeddings = network.encoder.forward_stages(image)
        logits = draw_out(network.head, features) if "logits" in needs else None
        return SegmentationOutput(logits, features, embeddings, image)


@contextlib.contextmanager
def gradient_into(output: SegmentationOutput) -> Iterator[None]:
    """Make the terms' ``detach`` leave the teacher's tensors alone, so that backward goes through the teacher too."""
    shown = {id(tensor) for tensor in (output.logits, *output.features, *output.embeddings)}
    detach = Tensor.detach
    with mock.patch.object(Tensor, "detach", lambda tensor: tensor if id(tensor) in shown else detach(tensor)):
        yield


def plain_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor, ignore: int) -> Tensor:
    """The cross-entropy at the labels' size as PyTorch has it: upsample all of the logits, then compare."""
    logits = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, target, weights, ignore_index=ignore)


# The step.


class Step:
    """One training step: forward of both networks, criterion, backward, the optimizer's step where there is one.

    Args:
        parts: shared by the alternatives, which therefore have the same weights.
        choices: of ``CHOICES``; without any it is what ``Distiller`` does. ``teacher-graph`` neither freezes
            the teacher nor spares its head, and backward goes through it; ``unfolded`` draws out both decode heads;
            ``explicit-attention`` holds each attention matrix in memory; ``plain-layers`` computes
            linear layers by ``F.linear`` and leaves weights as PyTorch lays them out; ``plain-cross-entropy``
            upsamples the logits to the labels' size in one piece. One more is none of a first
            implementation: ``checkpointing`` lets the student compute its activations again in the backward pass.
        compiled: the mode of ``torch.compile`` in which networks and terms are compiled, as ``transkd.train`` does it,
            in a copy of the parts; None for none.
        dtype: bfloat16 computes the step under autocast; the weights stay as they are.
        whole: compile each network in one piece, not in regions.
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
        """The whole step; no gradient is left."""
        self.backward(self.loss(image, target))
        self.update()

    def loss(self, image: Tensor, target: Tensor, autocast: bool = True) -> Tensor:
        """The criterion's total."""
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
        """Gradients of everything that is trained."""
        loss.backward()

    def update(self) -> None:
        """The optimizer's step, and the gradients away."""
        if self.parts.optimizer is not None:
            self.parts.optimizer.step()
        for module in self.modules():
            module.zero_grad()

    def modules(self) -> list[nn.Module]:
        """Student, criterion and, where there is one, teacher."""
        return [module for module in (self.student, self.criterion, self.teacher) if module is not None]

    def gradients(self, image: Tensor, target: Tensor, autocast: bool = False) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients of everything that is trained."""
        loss = self.loss(image, target, autocast)
        self.backward(loss)
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parts.trained()]
        for module in self.modules():
            module.zero_grad()
        return loss.detach().clone(), found

    @contextlib.contextmanager
    def repeatable(self, dtype: torch.dtype) -> Iterator[None]:
        """Weights in another format, random numbers and the criterion's state from one start, and all as it was."""
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
    """Ours first, then the alternatives by name."""
    for choice in (choice for name in against for choice in AGAINST[name]):
        check_choice(parts, choice)
    steps = {"ours": Step(parts, dtype=dtype)}
    if compiled:
        steps["ours" + measure.COMPILED] = Step(parts, compiled=compiled, dtype=dtype)
    return steps | {name: Step(parts, AGAINST[name], dtype=dtype) for name in against}


def check_choice(parts: Parts, choice: str) -> None:
    """A choice that these parts do not leave is a mistake."""
    for network in filter(None, (parts.student, parts.teacher)):
        drawable = isinstance(network, Segmenter) and isinstance(network.head, SegformerHead)
        if choice == "unfolded" and not drawable:
            raise UserError(f"--against unfolded, drawn-out: {network.name} has no SegFormer head")
    if choice == "teacher-graph" and parts.teacher is None:
        raise UserError("--against teacher-graph, drawn-out: without distillation there is no teacher")


Outcome = tuple[Tensor, list[Tensor]]
"""Of a step: its loss and its gradients."""


class Difference(NamedTuple):
    """Between a step and ours, relative."""

    loss: float
    gradient: float  # of all gradients together, by their norm


def compare(steps: Mapping[str, Step], image: Tensor, target: Tensor) -> dict[str, Difference]:
    """How far each step is from the first.

    Gradients are compared in float64: in float32 the rounding decides on which side of its kink one ReLU in a million
    falls, and on drawn images and labels, whose gradients cancel, that alone is up to 1e-3 of their norm. A compiled
    step is compared with ours as both are timed: it would be compiled anew for another type or size.

    Raises:
        UserError: one is further away than rounding explains, so that its time would mean nothing.
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
    """Of loss and gradients, relative to what is expected."""
    loss = (found[0] - expected[0]).abs() / expected[0].abs()
    return Difference(loss.item(), (distance(found[1], expected[1]) / norm(expected[1])).item())


def check_difference(
    name: str, difference: Difference, loss: float = LOSS_TOLERANCE, gradient: float = GRADIENT_TOLERANCE
) -> None:
    """Refuse what does not compute the same."""
    if not (difference.loss <= loss and difference.gradient <= gradient):
        raise UserError(
            f"{name} does not compute the same step: its loss is {difference.loss:.1e} away from ours and its "
            f"gradients {difference.gradient:.1e} (relative), expected at most {loss:.0e} and {gradient:.0e}; nothing "
            "was timed"
        )


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """No TensorFloat-32, which would hide small mistakes behind its own rounding."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all numbers together."""
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Euclidean distance of all numbers together."""
    return norm([one - other for one, other in zip(ours, theirs, strict=True)])


def add_step_options(parser: Any, several: bool) -> None:
    """Which networks, which terms."""
    parser.add_argument("--teacher", default="segformer_b2", help="of conf/teacher")
    parser.add_argument("--student", default="segformer_b0", help="of conf/student")
    many: dict[str, Any] = {"nargs": "+", "default": ["transkd_base"]} if several else {"default": "transkd_base"}
    parser.add_argument("--distill", **many, help="of conf/distill" + (", a row each" if several else ""))
    parser.add_argument("--optimizer", action="store_true", help="with the optimizer's step (AdamW)")

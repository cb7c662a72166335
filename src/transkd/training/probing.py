"""Measurements of the command ``check``: what terms read and weigh, and time and memory of real training steps."""

import contextlib
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from transkd.data import SegmentationDataModule
from transkd.losses import Criterion, gradient_statistics
from transkd.models import Network
from transkd.outputs import SegmentationOutput
from transkd.training.device import Device
from transkd.training.rehearsal import values_on_one_batch

__all__ = ["PeakMemory", "StepTimer", "Tap", "ValidationTimer", "loader_seconds", "taps_and_readers", "term_gradients"]

LONGEST = 6.0  # seconds after which no more steps, or batches of the loader, are timed


@dataclass
class Tap:
    """An output of both networks.

    Attributes:
        name: "image", "embeddings 1", …, "features 1", …, "logits".
        student: shape of the student's; None if it has none.
        teacher: shape of the teacher's.
        readers: terms whose gradient reaches the student's.
    """

    name: str
    student: list[int] | None
    teacher: list[int] | None
    readers: list[str] = field(default_factory=list)


def taps_and_readers(
    criterion: Criterion, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor
) -> list[Tap]:
    """Outputs of both networks for an image, and the terms that read them.

    A term reads an output of the student if its gradient reaches it; terms that are off at first are left out.

    Args:
        criterion: the terms.
        student: the student's outputs.
        teacher: the teacher's.
        target: the label [B, H, W].
    """
    training = criterion.training
    with torch.random.fork_rng():
        leaves = {name: tensor.detach().float().requires_grad_() for name, tensor in named_outputs(student).items()}
        values = criterion.eval()(_with(student, leaves), teacher, target).values
    criterion.train(training)
    shown = named_outputs(teacher) if teacher is not None else {}
    taps = {
        name: Tap(name, _shape(leaves.get(name)), _shape(shown.get(name))) for name in dict.fromkeys([*leaves, *shown])
    }
    for term, value in values.items():
        gradients = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                taps[name].readers.append(term)
    return list(taps.values())


def named_outputs(output: SegmentationOutput) -> dict[str, Tensor]:
    """Tensors of an output by name, in the order in which a network computes them."""
    named = {"image": output.image}
    for i, embedding in enumerate(output.embeddings, start=1):
        named[f"embeddings {i}"] = embedding
    for i, feature in enumerate(output.features, start=1):
        named[f"features {i}"] = feature
    return named if output.logits is None else {**named, "logits": output.logits}


def _with(output: SegmentationOutput, tensors: dict[str, Tensor]) -> SegmentationOutput:
    return SegmentationOutput(
        tensors.get("logits"),
        tuple(tensors[f"features {i}"] for i in range(1, len(output.features) + 1)),
        tuple(tensors[f"embeddings {i}"] for i in range(1, len(output.embeddings) + 1)),
        tensors["image"],
    )


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


def term_gradients(
    student: Network, teacher: nn.Module | None, criterion: Criterion, data: SegmentationDataModule
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of the terms on the first images, and ``gradient_statistics`` of them on the student's weights."""
    modes = student.training, criterion.training
    student.eval(), criterion.eval()  # until the gradients are there: activation checkpointing computes blocks again
    values = values_on_one_batch(student, teacher, criterion, data)
    statistics = gradient_statistics(values, list(student.parameters()))
    student.train(modes[0]), criterion.train(modes[1])
    return {name: value.detach() for name, value in values.items()}, statistics


def loader_seconds(data: SegmentationDataModule) -> float:
    """Seconds per batch of the training loader, its start left out where an epoch has more than one batch."""
    loader: Any = data.train_dataloader()
    wanted = 2 * max(1, loader.num_workers) + 1
    begin = first = time.perf_counter()
    batches = 0
    for batches, _ in enumerate(loader, start=1):
        if batches == 1:
            first = time.perf_counter()
        if batches == wanted or time.perf_counter() - first > LONGEST:
            break
    end = time.perf_counter()
    return (end - first) / (batches - 1) if batches > 1 else end - begin


class StepTimer(L.Callback):
    """Time training steps, optimizer included and loader left out, and stop the training after some of them.

    Attributes:
        seconds: of each step; the first is a warm-up.
        peak: memory at its peak in all steps, in bytes; see ``PeakMemory``.
    """

    def __init__(self, steps: int, device: Device) -> None:
        self.steps, self.memory = steps, PeakMemory(device)
        self.seconds: list[float] = []
        self.peak = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to watch the memory, with networks and optimizer on the device."""
        self.memory.start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self.begin = _now(self.memory.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Stop the clock, and the training when there are enough steps."""
        self.seconds.append(_now(self.memory.device) - self.begin)
        self.peak = self.memory.read()
        if len(self.seconds) >= self.steps or (len(self.seconds) > 1 and sum(self.seconds) > LONGEST):
            trainer.should_stop = True


class ValidationTimer(L.Callback):
    """Time validation batches, loader included, but its start left out where there is more than one batch."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.marks: list[float] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.marks.append(_now(self.device))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Read the clock."""
        self.marks.append(_now(self.device))

    @property
    def seconds(self) -> float:
        """Seconds per batch."""
        marks = self.marks[1:] if len(self.marks) > 2 else self.marks
        return (marks[-1] - marks[0]) / (len(marks) - 1)


def _now(device: Device) -> float:
    if device.kind.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory:
    """Memory of this process at its peak since ``start``.

    On CUDA what PyTorch allocated on the device. Elsewhere the resident memory of the process, with interpreter,
    libraries and weights; where the system is not Linux, since the start of the process.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    @property
    def measured(self) -> str:
        """What is measured, in words."""
        if self.device.kind.type == "cuda":
            return "allocated by PyTorch on the GPU at the peak"
        return "resident memory of the process at the peak, with interpreter and libraries; without loader workers"

    def start(self) -> None:
        """Forget earlier peaks."""
        if self.device.kind.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def read(self) -> int:
        """Return the peak in bytes."""
        if self.device.kind.type == "cuda":
            return torch.cuda.max_memory_allocated()
        try:
            status = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak * (1 if platform.system() == "Darwin" else 1024)
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def explain_failure(
    what: str, error: Exception, batch_size: int, explain: Callable[[BaseException], str | None]
) -> str:
    """One line for an exception; anything but a user's mistake is named by its type."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{what}: data.batch_size={batch_size} does not fit into the memory of the device; lower it, and raise "
            "trainer.accumulate_grad_batches, or set student.checkpointing=true or trainer.precision=16-mixed"
        )
    message = explain(error)
    if message is not None:
        return message
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{what}: {type(error).__name__}: {' '.join(str(error).split())}"

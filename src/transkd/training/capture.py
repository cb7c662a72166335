"""What a step leaves whose loss is not finite: all that is needed to compute it again."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transkd.errors import UserError
from transkd.files import read_tensor_file, write_atomically

__all__ = ["CAPTURE", "Capture", "Step", "random_state", "read_capture"]

CAPTURE = "not_finite.pt"
"""Name of the file in the folder of a run."""


class Step(NamedTuple):
    """A step whose loss is being looked at.

    Attributes:
        finite: whether the loss is finite, on the host; a device may still be writing it.
        written: passed by the device when it has written ``finite``; None if it is written.
        batch: what the data module gave.
        values: value of each term before its weight.
        random: random state before the step.
    """

    finite: Tensor
    written: torch.Event | None
    batch: Any
    values: Mapping[str, Tensor]
    random: dict[str, Tensor]

    @classmethod
    def watch(cls, loss: Tensor, batch: Any, values: Mapping[str, Tensor], random: dict[str, Tensor]) -> "Step":
        """Begin to copy the verdict to the host, without waiting for the device."""
        finite = loss.detach().isfinite()
        written = None
        if finite.is_cuda:
            finite = finite.to("cpu", non_blocking=True)
            written = torch.Event(device=loss.device)
            written.record()
        return cls(finite, written, batch, {name: value.detach() for name, value in values.items()}, random)

    def is_finite(self) -> bool:
        """Wait for the forward pass; the device has the backward pass to compute meanwhile."""
        if self.written is not None:
            self.written.synchronize()
        return bool(self.finite)


@dataclass(frozen=True)
class Capture:
    """Where a step is written whose loss is not finite.

    Attributes:
        folder: folder of the run.
        part: which network is trained, "student" or "teacher".
    """

    folder: Path
    part: str = "student"

    def write(self, content: dict[str, Any], rank: int = 0) -> Path:
        """Write tensors and plain values; return the file."""
        name = CAPTURE if rank == 0 else CAPTURE.replace(".pt", f"_rank{rank}.pt")
        buffer = io.BytesIO()
        torch.save({"part": self.part, **_on_cpu(content)}, buffer)
        write_atomically(self.folder / name, buffer.getbuffer())
        return self.folder / name


def read_capture(path: Path) -> dict[str, Any]:
    """Read the file of a step; ``path`` is it or the folder of its run.

    Raises:
        UserError: there is none, or it is another file.
    """
    file = path
    if path.is_dir():  # of several processes each has a file of its own, and perhaps one alone has any
        file = min(path.glob(CAPTURE.replace(".pt", "*.pt")), default=path / CAPTURE)
    if not file.is_file():
        raise UserError(f"there is no {file}: expected the folder of a run that ended with a loss that was not finite")
    content, _ = read_tensor_file(file)
    if not isinstance(content, Mapping) or not {"part", "batch", "values", "weights"} <= content.keys():
        raise UserError(f"{file} is not the {CAPTURE} of a run")
    return dict(content)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of PyTorch's generators, by device type."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def _on_cpu(value: Any) -> Any:
    """Tensors in the host's memory, and plain containers, which torch.load reads without executing code."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_cpu(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_on_cpu(part) for part in value]
    return value

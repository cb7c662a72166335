"""What is set for the device that a run trains on: compiled code and the layout of weights."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transkd.errors import UserError

__all__ = ["Device", "check_compiler", "compile_in_place"]

NEEDED = {"cpu": "a C++ compiler such as g++", "cuda": "triton and a C compiler such as gcc"}


@dataclass(frozen=True)
class Device:
    """The device of a run, and how networks and terms are laid out and compiled for it.

    Attributes:
        kind: the kind of device that Lightning trains on.
        compile_mode: a mode of ``torch.compile``; None runs eager code.
        channels_last: whether weights and images are laid out channels-last.
    """

    kind: torch.device
    compile_mode: str | None = None
    channels_last: bool = False

    @classmethod
    def choose(
        cls, accelerator: str = "auto", compile: bool | str = False, channels_last: bool | str = "auto"
    ) -> "Device":
        """Read the settings ``trainer.accelerator``, ``compile`` and ``channels_last``.

        Args:
            accelerator: Lightning's; "cpu", or anything else for the accelerator that is there.
            compile: True is the mode "default" of ``torch.compile``; a string names another one.
            channels_last: "auto" is true on a CPU, where it was measured to pay.
        """
        found = None if accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True)
        kind = found or torch.device("cpu")
        mode = "default" if compile is True else compile or None
        return cls(kind, mode, kind.type == "cpu" if channels_last == "auto" else bool(channels_last))

    @property
    def local(self) -> torch.device:
        """This process's own device, as torchrun and Lightning number them."""
        return (
            self.kind if self.kind.type == "cpu" else torch.device(self.kind.type, int(os.environ.get("LOCAL_RANK", 0)))
        )

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of images."""
        return torch.channels_last if self.channels_last else torch.preserve_format

    def check(self) -> None:
        """Try the compiler where one is needed; compiling comes only after the teacher's own training."""
        if self.compile_mode is not None:
            check_compiler(self.kind, self.compile_mode)

    def lay_out(self, *modules: nn.Module | None) -> None:
        """Lay the weights out as the images are."""
        if self.channels_last:
            for module in filter(None, modules):
                module.to(memory_format=torch.channels_last)

    def compile(self, *modules: nn.Module | None, keep_graph: bool = False) -> None:
        """Compile each module in place where that was asked for; see ``compile_in_place``."""
        if self.compile_mode is not None:
            compile_in_place(*filter(None, modules), mode=self.compile_mode, keep_graph=keep_graph)


def check_compiler(device: torch.device, mode: str = "default") -> None:
    """Compile a tiny function for a device, to see at the start that it can be done.

    Raises:
        UserError: compiling failed (says what is missing), or ``torch.compile`` has no such mode.
    """
    from torch._inductor import list_mode_options  # takes a second to import

    modes = list_mode_options()
    if mode not in modes:
        raise UserError(f"compile={mode}: expected true, false or a mode of torch.compile: {', '.join(modes)}")
    try:
        torch.compile(_tiny, mode=mode)(torch.ones(8, device=device))
    except Exception as error:  # whatever the backend, the compiler or the system raises
        needed = NEEDED.get(device.type, "a compiler that PyTorch supports")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"compile=true needs {needed} for device {device.type}, but a trial failed ({reason}); install it, or "
            "train without: compile=false"
        ) from error


def _tiny(x: Tensor) -> Tensor:
    return x.sin() + 1


def compile_in_place(*modules: nn.Module, mode: str = "default", keep_graph: bool = False) -> None:
    """Run each module as compiled code from its next call on; names, state and copies stay plain.

    The first image size gets code of its own; a second one makes the code general.

    Args:
        modules: called as they are elsewhere.
        mode: of ``torch.compile``. With "reduce-overhead" and "max-autotune" a GPU replays CUDA graphs, and a module's
            output is overwritten at the next step (``torch.compiler.cudagraph_mark_step_begin``).
        keep_graph: whether gradients of a step are taken more than once, as automatic weights do; compiled code
            otherwise reuses the memory of what it kept for the backward pass.
    """
    torch.compiler.reset()  # earlier jobs of a sweep and the teacher's training count towards torch's limits
    torch._functorch.config.donated_buffer = not keep_graph
    for module in modules:
        module.compile(mode=mode)

"""What is set for the device that a run trains on: compiled code and the layout of weights."""

import os
from dataclasses import dataclass

import torch
from torch import nn

from transkd.training.compilation import check_compiler, compile_in_place

__all__ = ["Device"]


@dataclass(frozen=True)
class Device:
    """The device of a run, and how networks and terms are laid out and compiled for it.

    Attributes:
        kind: the kind of device that Lightning trains on.
        compile_mode: a mode of ``torch.compile``; None runs eager code.
        channels_last: whether weights and images are laid out channels-last.
        regions: whether networks are compiled in regions instead of as a whole.
    """

    kind: torch.device
    compile_mode: str | None = None
    channels_last: bool = False
    regions: bool = False

    @classmethod
    def choose(
        cls,
        accelerator: str = "auto",
        compile: bool | str = False,
        channels_last: bool | str = "auto",
        regions: bool = False,
    ) -> "Device":
        """Read the settings ``trainer.accelerator``, ``compile``, ``channels_last`` and ``compile_regions``.

        Args:
            accelerator: Lightning's; "cpu", or anything else for the accelerator that is there.
            compile: True is the mode "default" of ``torch.compile``; a string names another one.
            channels_last: "auto" is true on a CPU, where it was measured to pay.
            regions: compile a network's repeated blocks once for all of their kind.
        """
        found = None if accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True)
        kind = found or torch.device("cpu")
        mode = "default" if compile is True else compile or None
        return cls(kind, mode, kind.type == "cpu" if channels_last == "auto" else bool(channels_last), regions)

    @property
    def local(self) -> torch.device:
        """This process's own device, as torchrun and Lightning number them."""
        rank = int(os.environ.get("LOCAL_RANK", 0))
        return self.kind if self.kind.type == "cpu" else torch.device(self.kind.type, rank)

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
            found = filter(None, modules)
            compile_in_place(*found, mode=self.compile_mode, keep_graph=keep_graph, whole=not self.regions)

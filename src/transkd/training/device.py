"""Device of a run, with compilation and memory format."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from transkd.errors import UserError
from transkd.training.compilation import check_compiler, compile_in_place

log = logging.getLogger(__name__)

EARNED = 5000  # steps: on an H100 a compiled step saves 45 ms, and compiling takes two minutes

__all__ = ["Device", "device_of"]


def device_of(accelerator: str) -> torch.device:
    """Device type for Lightning's argument ``accelerator``: "cpu", or anything else for the available accelerator."""
    found = None if accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


@dataclass(frozen=True)
class Device:
    """Device of a run, and the compilation and memory format of networks and terms on it.

    Attributes:
        kind: device type that Lightning trains on.
        compile_mode: mode of ``torch.compile``; None runs eagerly; "auto" has to be decided by ``settled``.
        channels_last: whether weights and images are in channels-last memory format.
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
        compile: bool | str = "auto",
        channels_last: bool | str = "auto",
        regions: bool = False,
    ) -> "Device":
        """Read the settings ``trainer.accelerator``, ``compile``, ``channels_last`` and ``compile_regions``.

        Args:
            accelerator: Lightning's argument; "cpu", or anything else for the available accelerator.
            compile: True is the mode "default" of ``torch.compile``; a string names another one, or is "auto".
            channels_last: "auto" is true on a CPU, where it was measured to be faster (docs/performance.md).
            regions: compile repeated blocks of a network once.
        """
        kind = device_of(accelerator)
        mode = "default" if compile is True else compile or None
        if mode == "auto" and kind.type != "cuda":
            mode = None  # eager code is faster on a CPU
        return cls(kind, mode, kind.type == "cpu" if channels_last == "auto" else bool(channels_last), regions)

    @property
    def local(self) -> torch.device:
        """Device of this process, by the local rank of torchrun and Lightning."""
        rank = int(os.environ.get("LOCAL_RANK", 0))
        return self.kind if self.kind.type == "cpu" else torch.device(self.kind.type, rank)

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of images."""
        return torch.channels_last if self.channels_last else torch.preserve_format

    def check(self) -> None:
        """Check for a compiler if one is needed; the run itself compiles only after the teacher's training."""
        if self.compile_mode not in (None, "auto"):
            check_compiler(self.kind, self.compile_mode)

    def settled(self, steps: int | None, obstacles: Sequence[str] = ()) -> "Device":
        """Decide ``compile=auto``: a mode if the run is long enough to earn the time of compiling back, else eager.

        Args:
            steps: optimizer steps of the run; None if unknown.
            obstacles: what in the run rules out CUDA graphs; such a run is compiled without them.
        """
        if self.compile_mode != "auto":
            return self
        if steps is not None and steps < EARNED:
            log.info("compile=auto: eager, since %d steps are fewer than the %d that pay for compiling", steps, EARNED)
            return replace(self, compile_mode=None)
        mode = "default" if obstacles else "reduce-overhead"
        try:
            check_compiler(self.kind, mode)
        except UserError as error:
            log.warning("compile=auto: eager, which is slower; %s", error)
            return replace(self, compile_mode=None)
        graphs = f"without CUDA graphs because of {', '.join(obstacles)}" if obstacles else "with CUDA graphs"
        log.info("compile=auto: compiled %s; the first step takes minutes, the next run finds the code again", graphs)
        return replace(self, compile_mode=mode)

    def lay_out(self, *modules: nn.Module | None) -> None:
        """Convert weights to the memory format of the images."""
        if self.channels_last:
            for module in filter(None, modules):
                module.to(memory_format=torch.channels_last)

    def compile(self, *modules: nn.Module | None, keep_graph: bool = False) -> None:
        """Compile each module in place if configured; see ``compile_in_place``."""
        if self.compile_mode is not None:
            found = filter(None, modules)
            compile_in_place(*found, mode=self.compile_mode, keep_graph=keep_graph, whole=not self.regions)

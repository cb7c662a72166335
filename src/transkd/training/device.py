"""What is set for the device that a run trains on: compiled code and the layout of weights."""

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses import Criterion

__all__ = [
    "check_compiler",
    "check_device",
    "compile_in_place",
    "compile_parts",
    "in_channels_last",
    "set_memory_format",
    "training_device",
]

NEEDED = {"cpu": "a C++ compiler such as g++", "cuda": "triton and a C compiler such as gcc"}


def training_device(cfg: DictConfig) -> torch.device:
    """The kind of device that Lightning will train on."""
    found = None if cfg.trainer.accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def check_device(cfg: DictConfig) -> None:
    """See at the start that what is asked for can be had: compiling comes after the teacher's own training."""
    if cfg.compile:
        check_compiler(training_device(cfg), compile_mode(cfg))


def check_compiler(device: torch.device, mode: str = "default") -> None:
    """Compile next to nothing for a device, to see at the start that it can be done.

    Raises:
        UserError: it cannot, or there is no such mode of ``torch.compile``; says what is missing.
    """
    from torch._inductor import list_mode_options  # takes a second, for those alone who compile

    modes = list_mode_options()
    if mode not in modes:
        raise UserError(f"compile={mode}: expected true, false or a mode of torch.compile: {', '.join(modes)}")
    try:
        torch.compile(_next_to_nothing, mode=mode)(torch.ones(8, device=device))
    except Exception as error:  # whatever the backend, the compiler or the system raises
        needed = NEEDED.get(device.type, "a compiler that PyTorch supports")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"compile=true needs {needed} for device {device.type}, but a trial failed ({reason}); install it, or go "
            "on without: compile=false"
        ) from error


def _next_to_nothing(x: Tensor) -> Tensor:
    return x.sin() + 1


def compile_in_place(*modules: nn.Module, mode: str = "default", keep_graph: bool = False) -> None:
    """Let each module run as compiled code of its own from its next call on; names, state and copies stay plain.

    A size of image gets code of its own at first; a second one makes it general.

    Args:
        modules: called as they are elsewhere.
        mode: of ``torch.compile``. With "reduce-overhead" and "max-autotune" a GPU replays CUDA graphs, and what a
            module gave is overwritten at the next step (``torch.compiler.cudagraph_mark_step_begin``).
        keep_graph: whether somebody takes gradients of a step more than once, as automatic weights do; compiled code
            otherwise reuses the memory of what it kept for the backward pass.
    """
    torch.compiler.reset()  # a sweep's earlier jobs and the teacher's own training count towards torch's limits
    if keep_graph:
        torch._functorch.config.donated_buffer = False
    for module in modules:
        module.compile(mode=mode)


def compile_mode(cfg: DictConfig) -> str:
    """The mode of ``torch.compile``; ``compile=true`` is its default one."""
    return "default" if cfg.compile is True else str(cfg.compile)


def compile_parts(cfg: DictConfig, criterion: Criterion, *networks: nn.Module | None) -> None:
    """Where that is asked for, compile networks and terms; weights and schedules stay plain Python."""
    if cfg.compile:
        parts = (*networks, *criterion.terms.values())
        looks_back = bool(cfg.gradients_every or criterion.shares)
        compile_in_place(*filter(None, parts), mode=compile_mode(cfg), keep_graph=looks_back)


def in_channels_last(cfg: DictConfig) -> bool:
    """Whether weights and images are laid out channels-last; ``auto``: on a CPU, where it was measured to pay."""
    if cfg.channels_last not in (True, False, "auto"):
        raise UserError(f"channels_last={cfg.channels_last}: expected true, false or auto")
    return training_device(cfg).type == "cpu" if cfg.channels_last == "auto" else cfg.channels_last


def set_memory_format(cfg: DictConfig, *parts: nn.Module | None) -> None:
    """Lay the weights out as the configuration says; the Distiller does so with the images."""
    if in_channels_last(cfg):
        for part in filter(None, parts):
            part.to(memory_format=torch.channels_last)

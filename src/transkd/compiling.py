"""torch.compile in a run: whether this machine can, and what is compiled."""

import torch
from torch import Tensor, nn

from transkd.errors import UserError

__all__ = ["check_compiler", "compile_in_place"]

NEEDED = {"cpu": "a C++ compiler such as g++", "cuda": "triton and a C compiler such as gcc"}


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

"""Compile networks and terms with torch.compile, in regions or as a whole; check for a compiler."""

import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from transkd.errors import UserError

__all__ = ["check_compiler", "compile_in_place", "keep_compiled_code", "regions"]

NEEDED = {"cpu": "a C++ compiler such as g++", "cuda": "triton and a C compiler such as gcc"}
CONTAINERS = (nn.ModuleList, nn.Sequential)
# recompile limit: all regions share the code of nn.Module's call, so each counts as a recompilation of it
VARIANTS = 64


def check_compiler(device: torch.device, mode: str = "default") -> None:
    """Compile a tiny function for a device, so that a missing compiler is reported at the start.

    Raises:
        UserError: compilation failed (names what is missing), or ``torch.compile`` has no such mode.
    """
    try:
        torch.compile(_tiny, mode=mode)(torch.ones(8, device=device))
    except Exception as error:  # backend, compiler and system raise various types
        needed = NEEDED.get(device.type, "a compiler that PyTorch supports")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "Unrecognized mode" in reason:
            raise UserError(f"compile={mode}: expected true, false or a mode of torch.compile ({reason})") from error
        raise UserError(
            f"compile=true needs {needed} for device {device.type}, but a trial failed ({reason}); install it, or "
            "train without: compile=false"
        ) from error


def _tiny(x: Tensor) -> Tensor:
    return x.sin() + 1


def keep_compiled_code(folder: Path) -> None:
    """Cache compiled code in a folder for later processes, unless the environment names another."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.absolute()))


def compile_in_place(*modules: nn.Module, mode: str = "default", keep_graph: bool = False, whole: bool = True) -> None:
    """Compile modules in place by ``Module.compile``; parameter names, ``state_dict`` and copies are unaffected.

    In regions (``regions``) blocks of the same shape share compiled code, so start-up takes a fraction of the time, but
    each image size is compiled separately.

    Args:
        modules: networks and terms, called as before.
        mode: mode of ``torch.compile``. With "reduce-overhead" and "max-autotune" a GPU replays CUDA graphs, and a
            module's output is overwritten at the next step (``torch.compiler.cudagraph_mark_step_begin``).
        keep_graph: set it if a step computes gradients more than once, as for automatic weights; otherwise the compiled
            backward pass reuses the memory of saved tensors.
        whole: compile each module as one graph, made dynamic when a second image size occurs; False: in regions.
    """
    torch.compiler.reset()  # earlier jobs of a sweep and the teacher's training would count towards the recompile limit
    torch._functorch.config.donated_buffer = not keep_graph
    torch._dynamo.config.recompile_limit = VARIANTS
    for module in modules:
        parts = [module] if whole else regions(module)
        for part in parts:
            part.compile(mode=mode, dynamic=None if parts == [module] else False)


def regions(module: nn.Module) -> list[nn.Module]:
    """Parts of a network to compile one by one: repeated blocks, and the largest submodules between them.

    A block is an entry of a ``ModuleList`` or ``Sequential`` that has several entries of the same class and itself
    contains no blocks. A module without blocks or with activation checkpointing is a single region.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 4), nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3)))
        >>> [type(part).__name__ for part in regions(network)]
        ['Linear', 'Sequential', 'Sequential', 'Sequential']
    """
    recomputes = any(getattr(part, "grad_checkpointing", False) is True for part in module.modules())
    blocks = set() if recomputes else _blocks(module)
    return _between(module, blocks) if blocks else [module]


def _blocks(module: nn.Module) -> set[nn.Module]:
    candidates: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, CONTAINERS):
            counts = Counter(type(child) for child in part)
            candidates |= {child for child in part if counts[type(child)] > 1 and any(True for _ in child.children())}
    return {block for block in candidates if not candidates & set(list(block.modules())[1:])}


def _between(module: nn.Module, blocks: set[nn.Module]) -> list[nn.Module]:
    found = []
    for child in module.children():
        if child in blocks or not blocks & set(child.modules()):
            found += [child] if any(True for _ in child.parameters()) else []
        else:
            found += _between(child, blocks)
    return found

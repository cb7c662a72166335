"""Measure which of two equal computations of a layer is faster on this processor."""

import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd.errors import UserError
from transkd.files import write_atomically
from transkd.layers.attention import attend_by_convolutions, attend_by_kernel
from transkd.layers.choices import CHOICES, Choices
from transkd.layers.token_linear import convolved_row

__all__ = ["choose_layers"]

log = logging.getLogger(__name__)

Pair = tuple[Callable[[], object], Callable[[], object]]
"""The plain computation, and the same as convolutions."""

GAIN = 1.05  # convolutions have to be this much faster
WARMUP, ROUNDS = 2, 9
SHAPES = ((8192, 32, 128), (2048, 160, 160), (512, 256, 1024))  # tokens, in, out: stages 1, 3 and 4 of MiT-B0


def choose_layers(cache: Path | None = None) -> None:
    """Choose ``transkd.layers.choices`` by a measurement of about a second, once per machine.

    The result is stored, so that all runs on the same kind of machine compute the same bits.

    Args:
        cache: file of stored results; by default ``transkd/cpu_choices.json`` in the user's cache folder.
    """
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transkd" / "cpu_choices.json"
    machine = f"{_processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    stored = _stored(cache)
    try:
        found, origin = Choices(**stored[machine]), f"measured earlier, {cache}"
    except (KeyError, TypeError):
        found, origin = _measure(), "measured now"
        _store(cache, {**stored, machine: asdict(found)})
    for name, chosen in asdict(found).items():
        setattr(CHOICES, name, chosen)
    used = [name for name, chosen in asdict(found).items() if chosen]
    log.info("layers computed as 1×1 convolutions on this CPU: %s (%s)", ", ".join(used) or "none", origin)


def _measure() -> Choices:
    return Choices(
        linear=_gain(*_linear(torch.float32)) > GAIN,
        linear_bf16=_gain(*_linear(torch.bfloat16)) > GAIN,
        attention=_gain(*_attention()) > GAIN,
    )


def _gain(plain: Callable[[], object], convolved: Callable[[], object]) -> float:
    """Median ratio of the plain computation's time to the other's, in alternating turns."""
    ratios = [_seconds(plain) / _seconds(convolved) for _ in range(WARMUP + ROUNDS)]
    return statistics.median(ratios[WARMUP:])


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _linear(dtype: torch.dtype) -> Pair:
    """Forward and backward of linear layers."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for tokens, inputs, outputs in SHAPES:
        shapes = ((1, tokens, inputs), (outputs, inputs), (outputs,))
        layers.append([torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes])

    def run(layer: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: [torch.autograd.grad(layer(*given).sum(), given) for given in layers]

    return run(F.linear), run(convolved_row)


def _attention() -> Pair:
    """Attention of one image without gradients, as in stage 1 of MiT-B0 at 256×512."""
    generator = torch.Generator().manual_seed(0)
    query, pair = (torch.randn(1, *shape, generator=generator) for shape in ((8192, 32), (128, 64)))
    return lambda: attend_by_kernel(query, pair, 1), lambda: attend_by_convolutions(query, pair, 1)


def _processor() -> str:
    """Family, model and name of the processor; the architecture where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()[:12]
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    wanted = ("model name", "cpu family", "model")
    return " ".join(fields[name] for name in wanted if name in fields) or platform.machine()


def _stored(cache: Path) -> dict[str, dict[str, bool]]:
    try:
        stored = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _store(cache: Path, choices: dict[str, dict[str, bool]]) -> None:
    try:
        write_atomically(cache, json.dumps(choices, indent=1).encode())
    except UserError as error:
        log.info("the layers are measured again at the next start: %s", error)

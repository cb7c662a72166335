"""How much memory a computation takes at its peak."""

from collections.abc import Callable

from torch.profiler import profile


def peak_memory(compute: Callable[[], object]) -> int:
    """Bytes that PyTorch held at once during a call, beyond what it held before."""
    compute()  # whatever is made once
    with profile(profile_memory=True) as recorded:
        compute()
    level = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak

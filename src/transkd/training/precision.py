"""Numeric precision of training and of scores."""

import torch

__all__ = ["choose_precision"]

FULL, MIXED = "32-true", "bf16-mixed"


def choose_precision(setting: str | int, kind: torch.device, trains: bool = True) -> str | int:
    """Lightning's ``precision`` for ``trainer.precision``; "auto" depends on the hardware.

    "auto" trains in bfloat16 (mixed) where the device multiplies matrices in it: NVIDIA GPUs from Ampere on, CPUs with
    AMX or AVX512-BF16. Scores are computed in float32, so that a student has the same score on every machine.

    Args:
        setting: "auto", or a value that Lightning takes.
        kind: device type of the run.
        trains: whether the precision is for training.

    Example:
        >>> choose_precision("16-mixed", torch.device("cuda"))
        '16-mixed'
        >>> choose_precision("auto", torch.device("cpu"), trains=False)
        '32-true'
    """
    if setting != "auto":
        return setting
    return MIXED if trains and _multiplies_bf16(kind) else FULL


def _multiplies_bf16(kind: torch.device) -> bool:
    if kind.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # older PyTorch does not tell; without the instructions bfloat16 is ten times slower than float32
    if kind.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))

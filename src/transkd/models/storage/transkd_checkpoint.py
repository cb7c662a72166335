"""Conversion of the TransKD authors' checkpoints to our modules."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from transkd.errors import UserError

__all__ = ["split_transkd_checkpoint"]

StateDict = dict[str, Tensor]

FUSION_LAYERS = {
    "conv1.0": "reduce.conv",
    "conv1.1": "reduce.norm",
    "fc.0": "squeeze.conv",
    "fc.1": "squeeze.norm",
    "fcs.0": "student_branch",
    "fcs.1": "residual_branch",
    "conv2.0": "expand.conv",
    "conv2.1": "expand.norm",
}
# Name in the checkpoint -> part and name in ours; other conversions are in the functions below.
RENAMED = (
    (re.compile(r"student\.((?:patch_embed|block|norm)\d\..+)"), "student", r"encoder.\1"),
    (re.compile(r"student\.((?:linear_c\d|linear_fuse|linear_pred)\..+)"), "student", r"head.\1"),
    (re.compile(r"attn4\.((?:qkv|proj)\..+)"), "gl_mixer", r"\1"),
    (re.compile(r"conv1\.(weight|bias)"), "gl_mixer", r"value.\1"),
    (re.compile(r"conv2\.(weight|bias)"), "gl_mixer", r"gate.\1"),
    (re.compile(r"atten_weight"), "gl_mixer", r"alpha"),
    (re.compile(r"conv_weight"), "gl_mixer", r"beta"),
)
FUSION = re.compile(r"skfs\.(\d)\.(\w+\.\d)\.(.+)")
PROJECTION = re.compile(r"embed(\d)_linearproject\.(weight|bias)")
ASSISTANT = re.compile(r"patch_embed(\d)\.(.+)")
SHARE = re.compile(r"fuse_weights\.(\d)")


def split_transkd_checkpoint(state_dict: Mapping[str, Tensor]) -> dict[str, StateDict]:
    """Split a checkpoint in the authors' naming into student and terms under our names.

    Args:
        state_dict: tensors by name: the student's with the prefix ``student.``, the training modules' without; all may
            have the prefix ``module.`` of data-parallel training.

    Returns:
        By name "student" (for a `Segmenter`), "csf", "pea", "gl_mixer" and "ea" (for the terms of
        `transkd.losses`), each to be loaded with ``strict=True`` into a module of the same size. Parts that
        the checkpoint does not contain are absent.

    Raises:
        UserError: a tensor does not belong to any of these parts.

    Example:
        >>> parts = split_transkd_checkpoint({"module.embed1_linearproject.weight": torch.zeros(12, 8)})
        >>> {part: list(tensors) for part, tensors in parts.items()}
        {'pea': ['projections.1.weight']}
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    parts: dict[str, StateDict] = {}
    for name, tensor in tensors.items():
        if _is_dropped(name):
            continue
        part, ours = _place(name, tensors)
        parts.setdefault(part, {})[ours] = tensor
    if "ea" in parts:
        _join_shares(parts["ea"])
    for tensors_of_part in parts.values():
        _count_batches(tensors_of_part)
    return parts


def _is_dropped(name: str) -> bool:
    # separate squeeze for batches of one; ours uses the same for all
    return re.match(r"skfs\.\d\.fc1\.", name) is not None


def _place(name: str, names: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return the part that a tensor belongs to and its name there."""
    if (match := FUSION.fullmatch(name)) and match[2] in FUSION_LAYERS:
        deepest = 1 + max(int(found[1]) for other in names if (found := FUSION.fullmatch(other)))
        return "csf", f"stages.{deepest - int(match[1])}.{FUSION_LAYERS[match[2]]}.{match[3]}"
    assisted = any(SHARE.fullmatch(other) for other in names)
    if assisted and (match := ASSISTANT.fullmatch(name)):
        return "ea", f"assistants.{match[1]}.{match[2]}"
    if match := PROJECTION.fullmatch(name):
        if assisted:
            return "ea", f"projections.{match[1]}.{match[2]}"
        if match[1] == "4" and any(other.startswith("attn4.") for other in names):
            return "gl_mixer", f"projection.{match[2]}"
        return "pea", f"projections.{match[1]}.{match[2]}"
    if SHARE.fullmatch(name):
        return "ea", name
    for pattern, part, ours in RENAMED:
        if match := pattern.fullmatch(name):
            return part, match.expand(ours)
    raise UserError(
        f"{name!r} is not a tensor of a TransKD checkpoint: expected student.*, skfs.*, embed*_linearproject, "
        "attn4.*, conv1, conv2, atten_weight, conv_weight, patch_embed*, fuse_weights.*. "
        "Is it a checkpoint of another kind?"
    )


def _join_shares(part: StateDict) -> None:
    """Concatenate the scalars, all u followed by all v, to our two tensors."""
    names = sorted(name for name in part if SHARE.fullmatch(name))
    if names:
        shares = torch.cat([part.pop(name).reshape(1) for name in names])
        part["student_share"], part["assistant_share"] = shares.chunk(2)


def _count_batches(part: StateDict) -> None:
    """Add BatchNorm's batch counters, which some libraries do not save; they do not affect results."""
    for name in [name for name in part if name.endswith(".running_mean")]:
        part.setdefault(f"{name.removesuffix('running_mean')}num_batches_tracked", torch.tensor(0))

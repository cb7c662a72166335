"""Checks before anything is solved; each message says what would work."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.models.heads.segformer import SegformerHead
from transkd.models.inherit.families import Stage, stages_of
from transkd.models.network import Network
from transkd.models.segmenter import Segmenter

__all__ = ["Images", "Pair", "batched", "check_finite", "check_pair", "image_batches"]

Images = Tensor | Iterable[Tensor]  # of which every walk gives the same
BATCH = 8
SMALLEST = 32  # pixels a side, the stride of the deepest stage


class Pair(NamedTuple):
    """The stages of two encoders that correspond."""

    teacher: list[Stage]
    student: list[Stage]


def check_pair(teacher: Network, student: Network) -> Pair:
    """The stages of both networks.

    Raises:
        UserError: their families do not correspond, or the student is somewhere larger than its teacher.
    """
    networks = (teacher, student)
    found = [stages_of(network.encoder) if isinstance(network, Segmenter) else None for network in networks]
    if found[0] is None or found[1] is None or type(teacher.encoder) is not type(student.encoder):
        raise UserError(
            f"solve: cannot solve {_kind(student)} from {_kind(teacher)}: expected two networks of one family, MiT "
            "(segformer_b0 … b5) or PVTv2 (pvt_v2_b0 … b5). Choose such a pair, or "
            "student.from_teacher=select (in Python how='select') for two networks whose parameters correspond by name"
        )
    pair = Pair(found[0], found[1])
    if len(pair.teacher) != len(pair.student) or teacher.scale != student.scale:
        raise UserError(
            f"solve: {student.name} has {len(pair.student)} stages and looks at images at scale {student.scale}, "
            f"{teacher.name} {len(pair.teacher)} and {teacher.scale}; expected the same of both"
        )
    for i, (theirs, ours) in enumerate(zip(*pair, strict=True), start=1):
        _check_stage(i, theirs, ours)
    _check_heads(cast(nn.Module, teacher.head), cast(nn.Module, student.head))
    return pair


def _kind(network: Network) -> str:
    encoder = getattr(network, "encoder", None)
    name = getattr(encoder, "architecture", type(encoder or network).__name__)
    return f"{network.name} ({name})"


def _check_stage(i: int, theirs: Stage, ours: Stage) -> None:
    sizes = {
        "channels": (theirs.width, ours.width),
        "blocks": (len(theirs.blocks), len(ours.blocks)),
        "hidden units": (theirs.blocks[0].ffn.fc1.out_features, ours.blocks[0].ffn.fc1.out_features),
    }
    for what, (of, count) in sizes.items():
        if count > of:
            raise UserError(
                f"solve: stage {i} has {count} {what} in the student and {of} in the teacher; expected at most as "
                "many. Choose a narrower, shallower student or a larger teacher"
            )
    for what, (its, mine) in {
        "patch embedding": (_geometry(theirs.embed), _geometry(ours.embed)),
        "key/value reduction": (
            _geometry(theirs.blocks[0].attention.reduce),
            _geometry(ours.blocks[0].attention.reduce),
        ),
    }.items():
        if its != mine:
            raise UserError(
                f"solve: the {what} of stage {i} is {mine} in the student and {its} in the teacher; expected the "
                "same positions in both. Give the student the teacher's, or choose "
                "student.from_teacher=select (in Python how='select')"
            )


def _geometry(conv: nn.Conv2d | None) -> str:
    return "none" if conv is None else f"{conv.kernel_size} at stride {conv.stride}"


def _check_heads(theirs: nn.Module, ours: nn.Module) -> None:
    if type(theirs) is not type(ours):
        raise UserError(
            f"solve: the student's decode head is a {type(ours).__name__}, the teacher's a {type(theirs).__name__}; "
            "expected the same kind. Give the student the teacher's: student.network.head=…"
        )
    if isinstance(theirs, SegformerHead) and isinstance(ours, SegformerHead):
        of, count = theirs.linear_pred.in_channels, ours.linear_pred.in_channels
        if count > of:
            raise UserError(
                f"solve: the student's decode head has {count} channels, the teacher's {of}; expected at most as many. "
                f"Set student.network.width={of}"
            )
        return
    for name, layer in ours.named_modules():
        its = theirs.get_submodule(name)
        if isinstance(layer, nn.Conv2d) and layer.out_channels != its.out_channels and name != "classifier":
            raise UserError(
                f"solve: head.{name} gives {layer.out_channels} channels in the student and {its.out_channels} in the "
                "teacher; expected heads of one width, unless they are SegFormer's. Set student.network.width to the "
                "teacher's"
            )


def check_finite(network: Network) -> None:
    """Raise an error if the teacher's weights contain NaN or infinity."""
    for name, tensor in network.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"inherit: {name} of the teacher {network.name} holds NaN or infinity; expected trained, finite "
                "weights. Take an earlier checkpoint of the teacher"
            )


def image_batches(images: Images | None) -> Iterator[Tensor]:
    """Batches [B, 3, H, W] of at most BATCH images.

    Raises:
        UserError: there are none, or they are no images, too small for the deepest stage, or hold NaN.
    """
    count = 0
    for batch in batched(images if images is not None else ()):
        count += len(batch)
        if batch.ndim != 4 or batch.shape[1] != 3 or min(batch.shape[-2:]) < SMALLEST:
            raise UserError(
                f"inherit: expected RGB images [N, 3, H, W] of at least {SMALLEST}×{SMALLEST} pixels, got "
                f"{list(batch.shape)}: the deepest stage has stride {SMALLEST}. Resize or pad them"
            )
        if batch.is_floating_point() and not bool(torch.isfinite(batch).all()):
            raise UserError("inherit: expected images of finite numbers in [0, 1], got NaN or infinity in one")
        yield batch
    if count == 0:
        raise UserError("inherit: expected images [N, 3, H, W], got none; a few dozen unlabelled ones do")


def batched(images: Images) -> Iterator[Tensor]:
    """Batches of at most BATCH images; consecutive images of equal size share one."""
    if isinstance(images, Tensor):
        yield from torch.split(images, BATCH)
        return
    waiting: list[Tensor] = []
    for image in images:
        if image.ndim == 4:
            yield from torch.split(image, BATCH)
            continue
        if waiting and (len(waiting) == BATCH or waiting[0].shape != image.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting)

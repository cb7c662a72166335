"""Solve an encoder stage by stage and block by block; each layer is fitted on the activations of the solved part."""

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd.models.encoders.mit import to_map, to_tokens
from transkd.models.inherit.activations import Activations, Batch
from transkd.models.inherit.attention import solve_attention
from transkd.models.inherit.families import Block, Stage
from transkd.models.inherit.feed_forward import solve_feed_forward
from transkd.models.inherit.fits import Solving, fit_linear, fit_norm
from transkd.models.inherit.subspaces import Basis, Moments, identity_basis, principal_basis

__all__ = ["solve_encoder"]


def solve_encoder(teacher: list[Stage], student: list[Stage], batches: Activations, solving: Solving) -> list[Tensor]:
    """Solve all stages; the batches contain the normalised image as "teacher_0" and "student_0".

    Adds the features "teacher_1" … and "student_1" … to the batches.

    Returns:
        For each stage a matrix [C_s, C_t]; the teacher's features are approximately the student's times this matrix.
    """
    like = teacher[0].embed.weight
    readers = [torch.eye(like.shape[1], dtype=like.dtype, device=like.device)]  # the image is the same for both
    for i, (theirs, ours) in enumerate(zip(teacher, student, strict=True)):
        basis = _stage_basis(theirs, ours, batches, i, solving)
        _solve_embedding(theirs, ours, basis, readers[-1], batches, i, solving)
        solving.advance()
        for j, block in enumerate(ours.blocks):
            first, last = (k * len(theirs.blocks) // len(ours.blocks) for k in (j, j + 1))
            _solve_block(list(theirs.blocks[first:last]), block, basis, batches, solving)
            solving.advance()
        _solve_norm(theirs, ours, basis, batches, i + 1)
        readers.append(basis.reader(theirs.norm))
    return readers[1:]


def _stage_basis(theirs: Stage, ours: Stage, batches: Activations, i: int, solving: Solving) -> Basis:
    """Basis of a stage's residual stream, from the normalised tokens, as only those are read by its layers."""
    if theirs.width == ours.width:
        return identity_basis(theirs.embed.weight)
    moments = Moments()

    def look(tokens: Tensor, times: int = 1) -> None:
        moments.add(F.layer_norm(tokens, tokens.shape[-1:]), times)

    for batch in batches:
        embedded = theirs.embed(batch[f"teacher_{i}"])
        grid, tokens = tuple(embedded.shape[-2:]), theirs.embed_norm(to_tokens(embedded))
        for block in theirs.blocks:
            look(tokens)
            tokens = block.attend(tokens, grid)
            look(tokens)
            tokens = block.feed(tokens, grid)
        look(tokens, 2 * len(theirs.blocks))  # the head and the next stage read this one
    return principal_basis(moments.second(), ours.width, solving.generator)


def _solve_embedding(
    theirs: Stage, ours: Stage, basis: Basis, reader: Tensor, batches: Activations, i: int, solving: Solving
) -> None:
    """Solve the patch embedding of stage i (from 0); adds "teacher", "student" and "grid" to the batches."""
    norm = theirs.embed_norm
    mix = basis.down if basis.identity else _centred(norm.weight[:, None] * basis.down)

    def raw(batch: Batch) -> Tensor:
        return to_tokens(theirs.embed(batch[f"teacher_{i}"]))

    fit_linear(
        batches,
        ours.embed,
        lambda b: b[f"student_{i}"],
        lambda b: raw(b) @ mix,
        solving,
        torch.einsum("ochw,dc,op->pdhw", theirs.embed.weight, reader, mix),
        lambda b: raw(b).var(-1).add(norm.eps).reciprocal(),  # the norm divides by the deviation
    )
    batches.define(
        embedded=lambda b: ours.embed(b[f"student_{i}"]),
        grid=lambda b: tuple(b["embedded"].shape[-2:]),
        teacher=lambda b: norm(raw(b)),
        student=lambda b: ours.embed_norm(to_tokens(b["embedded"])),
    )
    fit_norm(batches, ours.embed_norm, lambda b: to_tokens(b["embedded"]), lambda b: b["teacher"] @ basis.down)
    batches.store(teacher="teacher", student="student", grid="grid")


def _centred(mix: Tensor) -> Tensor:
    """Centre [C_t, C_s] over the input channels: a constant over them is dropped, as LayerNorm does."""
    return mix - mix.mean(0)


def _solve_block(theirs: list[Block], ours: Block, basis: Basis, batches: Activations, solving: Solving) -> None:
    """Solve one block of the student for one or more consecutive blocks of the teacher.

    Its attention is fitted to that of the first of them, the only one with the same input; its Mix-FFN is fitted to the
    remaining change up to the end of the last.
    """

    def trace(batch: Batch) -> list[Tensor]:
        tokens, seen = batch["teacher"], []
        for block in theirs:
            seen.append(block.attend(tokens, batch["grid"]))
            tokens = block.feed(seen[-1], batch["grid"])
        return [*seen, tokens]

    batches.define(trace=trace)
    batches.store(trace="trace")
    batches.define(entry_t=lambda b: b["teacher"], middle_t=lambda b: b["trace"][0])
    solve_attention(theirs[0], ours, basis, batches, solving)
    batches.define(middles_t=lambda b: b["trace"][:-1], end_t=lambda b: b["trace"][-1])
    solve_feed_forward(theirs, ours, basis, batches, solving)
    batches.define(end_t=lambda b: b["trace"][-1])
    batches.store(teacher="end_t")


def _solve_norm(theirs: Stage, ours: Stage, basis: Basis, batches: Activations, stage: int) -> None:
    """Solve the norm after a stage (from 1), and store the features."""
    fit_norm(batches, ours.norm, lambda b: b["student"], lambda b: basis.normed(theirs.norm, b["teacher"]))
    batches.define(
        feature_t=lambda b: to_map(theirs.norm(b["teacher"]), b["grid"]),
        feature_s=lambda b: to_map(ours.norm(b["student"]), b["grid"]),
    )
    batches.store(**{f"teacher_{stage}": "feature_t", f"student_{stage}": "feature_s"})

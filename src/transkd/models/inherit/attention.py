"""Solve a block's attention: queries, keys and values of fewer or narrower heads, and the projection."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd.layers.attention import attend
from transkd.models.encoders.mit import to_map
from transkd.models.inherit.activations import Activations, Batch
from transkd.models.inherit.families import Attention, Block
from transkd.models.inherit.fits import Solving, fit_linear, fit_norm
from transkd.models.inherit.subspaces import Basis, Moments, principal_basis, score_factors, value_factors

__all__ = ["solve_attention", "token_weight"]


def solve_attention(theirs: Block, ours: Block, basis: Basis, batches: Activations, solving: Solving) -> None:
    """Solve norm1 and attention of a block.

    The batches contain the teacher's tokens before the block, "entry_t", and after its attention, "middle_t", and the
    student's tokens "student", which are replaced by those after its attention.
    """
    teacher, student = theirs.attention, ours.attention
    batches.define(normed_t=lambda b: theirs.norm1(b["entry_t"]), normed_s=lambda b: ours.norm1(b["student"]))
    maps = head_maps(teacher, student, basis, batches)
    fit_norm(batches, ours.norm1, lambda b: b["student"], lambda b: basis.normed(theirs.norm1, b["entry_t"]))
    reader = basis.reader(theirs.norm1)
    fit_linear(
        batches,
        student.q,
        lambda b: b["normed_s"],
        lambda b: teacher.q(b["normed_t"]) @ maps.query,
        solving,
        maps.query.T @ teacher.q.weight @ reader.T,
    )
    if teacher.reduce is not None:
        reader = _solve_reduction(theirs, student, basis, reader, batches, solving)
    batches.define(
        context_t=lambda b: teacher.context(b["normed_t"], b["grid"]),
        context_s=lambda b: student.context(b["normed_s"], b["grid"]),
        heads_s=lambda b: student.attended(b["normed_s"], b["context_s"]),
        solved=lambda b: b["student"] + student.proj(b["heads_s"]),
    )
    both: Tensor = torch.block_diag(maps.key, maps.value)  # type: ignore[no-untyped-call]
    spare, start = both.abs().sum(0) == 0, student.kv.weight.clone()  # channels of heads wider than the teacher's
    fit_linear(
        batches,
        student.kv,
        lambda b: b["context_s"],
        lambda b: teacher.kv(b["context_t"]) @ both,
        solving,
        both.T @ teacher.kv.weight @ reader.T,
    )
    student.kv.weight[spare] = start[spare]  # zero keys and values would get no gradient
    fit_linear(
        batches,
        student.proj,
        lambda b: b["heads_s"],
        lambda b: b["middle_t"] @ basis.down - b["student"],
        solving,
        basis.down.T @ teacher.proj.weight @ maps.back.T,
        lambda b: token_weight(b["middle_t"]),
    )
    batches.store(student="solved")


def token_weight(tokens: Tensor) -> Tensor:
    """Weights [B, N] of tokens [B, N, C] in a fit: the reciprocal variance, as the following LayerNorms normalise."""
    return tokens.var(-1).add(1e-6).reciprocal()


def _solve_reduction(
    theirs: Block, student: Attention, basis: Basis, reader: Tensor, batches: Activations, solving: Solving
) -> Tensor:
    """Solve the spatial reduction and its norm; return the matrix [C_s, C_t] from our context to the teacher's.

    Only keys and values read the reduced map, so it has a basis of its own.
    """
    teacher = theirs.attention
    assert teacher.reduce is not None
    assert teacher.norm is not None
    assert student.reduce is not None
    assert student.norm is not None
    norm = teacher.norm
    batches.define(
        shrunk_t=lambda b: teacher.shrunk(b["normed_t"], b["grid"]),
        shrunk_s=lambda b: student.shrunk(b["normed_s"], b["grid"]),
    )
    inner = basis
    if not basis.identity:
        moments = Moments()
        for batch in batches:
            moments.add(F.layer_norm(batch["shrunk_t"], norm.normalized_shape, eps=norm.eps))
        inner = principal_basis(moments.second(), student.q.in_features, solving.generator)
    fit_linear(
        batches,
        student.reduce,
        lambda b: to_map(b["normed_s"], b["grid"]),
        lambda b: b["shrunk_t"] @ inner.down,
        solving,
        torch.einsum("ochw,dc,op->pdhw", teacher.reduce.weight, reader, inner.down),
    )
    fit_norm(batches, student.norm, lambda b: b["shrunk_s"], lambda b: inner.normed(norm, b["shrunk_t"]))
    return inner.reader(norm)


class HeadMaps(NamedTuple):
    """Maps [C_t, C_s] from the teacher's queries, keys and values to the student's, and back [C_s, C_t] for values."""

    query: Tensor
    key: Tensor
    value: Tensor
    back: Tensor


def head_maps(teacher: Attention, student: Attention, basis: Basis, batches: Activations) -> HeadMaps:
    """Low-rank factors of the teacher's heads for those of the student.

    Each of the student's heads approximates one of the teacher's. If the teacher has more heads, those with the largest
    outputs are kept; if it has fewer, several of the student's share one and take different parts of its values.
    Queries are rescaled, because the scores are divided by the root of the head's width.
    """
    like = teacher.q.weight
    if (teacher.heads, teacher.width) == (student.heads, student.width):
        eye = torch.eye(teacher.heads * teacher.width, dtype=like.dtype, device=like.device)
        return HeadMaps(eye, eye, eye, eye)
    factors = _head_factors(teacher, basis, batches)
    shared = _shared_heads([float(sizes.square().sum()) for *_, sizes in factors], student.heads)
    wide, narrow = teacher.width, student.width
    shape = (teacher.heads * wide, student.heads * narrow)
    query, key, value, back = (torch.zeros(shape, dtype=torch.float64, device=like.device) for _ in range(4))
    for a, (head, part) in enumerate(shared):
        (of_scores_q, of_scores_k), of_values, from_values, _ = factors[head]
        rank = min(wide, narrow)
        mine, its = slice(a * narrow, a * narrow + rank), slice(head * wide, (head + 1) * wide)
        query[its, mine] = of_scores_q[:, :rank] * (narrow / wide) ** 0.5
        key[its, mine] = of_scores_k[:, :rank]
        first = min(part * narrow, wide - rank)
        value[its, mine] = of_values[:, first : first + rank]
        back[its, mine] = from_values[first : first + rank].T
    return HeadMaps(query.to(like.dtype), key.to(like.dtype), value.to(like.dtype), back.T.to(like.dtype))


def _head_factors(
    teacher: Attention, basis: Basis, batches: Activations
) -> list[tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]]:
    moments = [(Moments(), Moments(), Moments()) for _ in range(teacher.heads)]
    for batch in batches:
        for seen, parts in zip(moments, zip(*_heads(teacher, batch), strict=True), strict=True):
            for moment, part in zip(seen, parts, strict=True):
                moment.add(part)
    readouts = torch.split((basis.down.T @ teacher.proj.weight).double(), teacher.width, dim=1)
    return [
        (
            score_factors(queries.second(), keys.second(), teacher.width),
            *value_factors(given.covariance(), readout, teacher.width),
        )
        for (queries, keys, given), readout in zip(moments, readouts, strict=True)
    ]


def _heads(teacher: Attention, batch: Batch) -> tuple[tuple[Tensor, ...], ...]:
    """Queries, keys and outputs of each head; keys are centred, since a common offset does not change the softmax."""
    tokens = batch["normed_t"]
    query, pair = teacher.q(tokens), teacher.kv(teacher.context(tokens, batch["grid"]))
    keys = pair.chunk(2, dim=-1)[0]
    given = attend(query, pair, teacher.heads)
    parts = (query, keys - keys.mean(1, keepdim=True), given)
    return tuple(torch.split(part, teacher.width, dim=-1) for part in parts)


def _shared_heads(sizes: list[float], count: int) -> list[tuple[int, int]]:
    """For each of the student's heads, the index of the teacher's head and of the part of its values."""
    if count <= len(sizes):
        largest = sorted(range(len(sizes)), key=lambda head: -sizes[head])[:count]
        return [(head, 0) for head in sorted(largest)]
    heads = [a * len(sizes) // count for a in range(count)]
    return [(head, a - heads.index(head)) for a, head in enumerate(heads)]

"""Solve a block's Mix-FFN: select hidden units, then fit their input and output weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd.models.inherit.activations import Activations, Batch
from transkd.models.inherit.attention import token_weight
from transkd.models.inherit.families import Block
from transkd.models.inherit.fits import Gram, Solving, fit_linear, fit_norm, some
from transkd.models.inherit.subspaces import Basis, reconstructing_units

__all__ = ["solve_feed_forward"]

POSITIONS = 16  # image positions per candidate hidden unit


def solve_feed_forward(theirs: list[Block], ours: Block, basis: Basis, batches: Activations, solving: Solving) -> None:
    """Solve norm2 and Mix-FFN of the student's block for one or more consecutive blocks of the teacher.

    Its hidden units are selected from those of all these blocks, to explain best the difference between the student's
    tokens after its attention and the teacher's after the last block.

    The batches contain the teacher's tokens after each block's attention, "middles_t", and after the last block,
    "end_t", and the student's tokens "student", which are replaced by those after the block.
    """
    student = ours.ffn
    batches.define(
        normed_s=lambda b: ours.norm2(b["student"]),
        hidden_t=lambda b: _hidden(theirs, b),
        active_t=lambda b: _active(theirs, b),
        target=lambda b: b["end_t"] @ basis.down - b["student"],
        active_s=lambda b: student.activated(b["normed_s"], b["grid"]),
        solved=lambda b: b["student"] + student.fc2(b["active_s"]),
    )
    fit_norm(batches, ours.norm2, lambda b: b["student"], lambda b: basis.normed(theirs[-1].norm2, b["middles_t"][-1]))
    units = _chosen_units(theirs, ours, batches, solving)
    incoming = torch.cat([block.ffn.fc1.weight @ basis.reader(block.norm2).T for block in theirs])
    outgoing = torch.cat([basis.down.T @ block.ffn.fc2.weight for block in theirs], dim=1)
    for name in ("weight", "bias"):
        filters = torch.cat([getattr(block.ffn.depthwise, name) for block in theirs])
        getattr(student.depthwise, name).copy_(filters[units])
    fit_linear(
        batches,
        student.fc1,
        lambda b: b["normed_s"],
        lambda b: b["hidden_t"][..., units],
        solving,
        incoming[units],
    )
    fit_linear(
        batches,
        student.fc2,
        lambda b: b["active_s"],
        lambda b: b["target"],
        solving,
        outgoing[:, units],
        lambda b: token_weight(b["end_t"]),
    )
    batches.store(student="solved")


def _hidden(theirs: list[Block], batch: Batch) -> Tensor:
    """Concatenated hidden units of all blocks before the depth-wise convolution."""
    middles = zip(theirs, batch["middles_t"], strict=True)
    return torch.cat([block.ffn.fc1(block.norm2(middle)) for block, middle in middles], dim=-1)


def _active(theirs: list[Block], batch: Batch) -> Tensor:
    hidden = batch["hidden_t"].chunk(len(theirs), dim=-1)
    filtered = [block.ffn.filtered(part, batch["grid"]) for block, part in zip(theirs, hidden, strict=True)]
    return F.gelu(torch.cat(filtered, dim=-1))


def _chosen_units(theirs: list[Block], ours: Block, batches: Activations, solving: Solving) -> Tensor:
    """Indices of the teacher's hidden units that the student keeps; all if it has as many."""
    count, of = ours.ffn.fc1.out_features, sum(block.ffn.fc1.out_features for block in theirs)
    if count == of:
        return torch.arange(count)
    gram = Gram()
    for batch in batches:
        parts = [batch[name].flatten(0, 1) for name in ("active_t", "target", "end_t")]
        chosen = some(len(parts[0]), POSITIONS * of / len(batches), solving.generator).to(parts[0].device)
        active, target, end = (part[chosen] for part in parts)
        gram.add(active, target, token_weight(end))
    units, outputs, _ = gram.centred()
    return reconstructing_units(units, outputs, count).cpu()

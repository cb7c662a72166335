"""Mix-FFN of a block, solved: which hidden units it takes over, what they read, what is read of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from transkd.models.inherit.activations import Activations, Batch
from transkd.models.inherit.attention import token_weight
from transkd.models.inherit.families import Block
from transkd.models.inherit.fits import Gram, Solving, fit_linear, fit_norm
from transkd.models.inherit.subspaces import Basis, reconstructing_units

__all__ = ["solve_feed_forward"]


def solve_feed_forward(theirs: list[Block], ours: Block, basis: Basis, batches: Activations, solving: Solving) -> None:
    """Solve norm2 and Mix-FFN of a block that stands for some of the teacher's.

    Its hidden units are chosen among those of all of these blocks, so that the student's stream goes as far as
    possible from after its own attention to the end of the last of them.

    The batches know the teacher's tokens after each block's attention, "middles_t", and at the end, "end_t", and the
    student's "student"; afterwards "student" is the student's at the end.
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
    units = _chosen_units(theirs, ours, batches)
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
    """The hidden units of all blocks before their depth-wise convolution, side by side."""
    middles = zip(theirs, batch["middles_t"], strict=True)
    return torch.cat([block.ffn.fc1(block.norm2(middle)) for block, middle in middles], dim=-1)


def _active(theirs: list[Block], batch: Batch) -> Tensor:
    hidden = batch["hidden_t"].chunk(len(theirs), dim=-1)
    filtered = [block.ffn.filtered(part, batch["grid"]) for block, part in zip(theirs, hidden, strict=True)]
    return F.gelu(torch.cat(filtered, dim=-1))


def _chosen_units(theirs: list[Block], ours: Block, batches: Activations) -> Tensor:
    """Which of the teacher's hidden units the student takes, all where it has as many."""
    count = ours.ffn.fc1.out_features
    if count == sum(block.ffn.fc1.out_features for block in theirs):
        return torch.arange(count)
    gram = Gram()
    for batch in batches:
        gram.add(batch["active_t"], batch["target"], token_weight(batch["end_t"]))
    units, outputs, _ = gram.centred()
    return reconstructing_units(units, outputs, count).cpu()

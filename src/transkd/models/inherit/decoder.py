"""Solve the decode head on the student's features."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.layers.upsampling import upsampled
from transkd.models.heads.segformer import SegformerHead
from transkd.models.inherit.activations import Activations
from transkd.models.inherit.fits import Gram, Solving, fit_linear, some, write
from transkd.models.inherit.subspaces import Moments, reconstructing_units

__all__ = ["solve_head"]

POSITIONS = 16  # image positions per candidate unit


def solve_head(
    theirs: nn.Module, ours: nn.Module, readers: Sequence[Tensor], batches: Activations, solving: Solving
) -> None:
    """Fit the student's head to the logits of the teacher's; if the classes differ, the classifier is unchanged.

    Args:
        theirs: the teacher's head.
        ours: the student's head, of the same kind.
        readers: result of ``solve_encoder``.
        batches: contain the features "teacher_1" … and "student_1" ….
        solving: settings.
    """
    stages = range(1, len(readers) + 1)
    batches.define(
        features_t=lambda b: [b[f"teacher_{i}"] for i in stages],
        features_s=lambda b: [b[f"student_{i}"] for i in stages],
    )
    if isinstance(theirs, SegformerHead):
        _solve_segformer(theirs, cast(SegformerHead, ours), readers, batches, solving)
    else:
        _solve_other(theirs, ours, readers, batches, solving)


def _solve_segformer(
    theirs: SegformerHead, ours: SegformerHead, readers: Sequence[Tensor], batches: Activations, solving: Solving
) -> None:
    """Solve the projections of all stages jointly, then the classifier; the fusing convolution becomes a sum."""
    weights, bias = theirs.fold()
    batches.define(
        active_t=lambda b: F.relu(theirs.linear_fuse.bn(_folded(weights, bias, b["features_t"]))),
        sum_t=lambda b: _folded(weights, bias, b["features_t"]),
        joined=lambda b: torch.cat([upsampled(f, b["features_s"][0].shape[-2:]) for f in b["features_s"]], dim=1),
        active_s=lambda b: F.relu(ours.linear_fuse.bn(_folded(*ours.fold(), b["features_s"]))),
    )
    units = _kept_units(theirs, ours, batches, solving)
    gram = Gram()
    for batch in batches:
        gram.add(batch["joined"], batch["sum_t"][:, units])
    solving.check(gram, ours)
    prior = torch.cat([weight.flatten(1)[units] @ reader.T for weight, reader in zip(weights, readers, strict=True)], 1)
    solved, shift = gram.solve(solving.ridge, prior)
    parts = torch.split(solved, [len(reader) for reader in readers], dim=1)
    for name, part in zip(ours.linears, parts, strict=True):
        write(cast(nn.Linear, ours.get_submodule(f"{name}.proj")), part, shift / len(parts))
    eye = torch.eye(len(units), device=solved.device)
    ours.linear_fuse.conv.weight.copy_(torch.cat([eye] * len(parts), dim=1)[:, :, None, None])
    statistics = theirs.linear_fuse.bn.state_dict()
    ours.linear_fuse.bn.load_state_dict({name: x[units] if x.ndim else x for name, x in statistics.items()})
    if ours.linear_pred.out_channels == theirs.linear_pred.out_channels:
        fit_linear(
            batches,
            ours.linear_pred,
            lambda b: b["active_s"],
            lambda b: theirs.linear_pred(b["active_t"]),
            solving,
            theirs.linear_pred.weight[:, units],
        )


def _folded(weights: Sequence[Tensor], bias: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Input of a SegFormer head's BatchNorm: the sum of the projected and upsampled features."""
    maps = [F.conv2d(feature, weight) for feature, weight in zip(features, weights, strict=True)]
    return torch.stack([upsampled(m, maps[0].shape[-2:]) for m in maps]).sum(0) + bias[:, None, None]


def _kept_units(theirs: SegformerHead, ours: SegformerHead, batches: Activations, solving: Solving) -> Tensor:
    """Indices of the teacher's units that a narrower head keeps: those that explain the logits best."""
    count, of = ours.linear_pred.in_channels, theirs.linear_pred.in_channels
    if count == of:
        return torch.arange(of)
    moments = Moments()
    for batch in batches:
        active = batch["active_t"].permute(0, 2, 3, 1).flatten(0, 2)
        chosen = some(len(active), POSITIONS * of / len(batches), solving.generator).to(active.device)
        moments.add(active[chosen])
    units = moments.covariance()
    return reconstructing_units(units, units @ theirs.linear_pred.weight.flatten(1).double().T, count).cpu()


def _solve_other(
    theirs: nn.Module, ours: nn.Module, readers: Sequence[Tensor], batches: Activations, solving: Solving
) -> None:
    """Copy layers of equal shape; solve those that read the narrower features, in order, then the classifier."""
    order = _calls(theirs, next(iter(batches))["features_t"])
    source, target = theirs.state_dict(), ours.state_dict()
    ours.load_state_dict({name: source[name] if source[name].shape == x.shape else x for name, x in target.items()})
    classifier = order[-1]
    for name in order:
        layer, its = (cast(nn.Conv2d, head.get_submodule(name)) for head in (ours, theirs))
        if layer.out_channels != its.out_channels or (layer.weight.shape == its.weight.shape and name != classifier):
            continue
        reader = next((r for r in readers if tuple(r.shape) == (layer.in_channels, its.in_channels)), None)
        prior = its.weight if layer.weight.shape == its.weight.shape else None
        if prior is None and reader is not None:
            prior = torch.einsum("ochw,dc->odhw", its.weight, reader)
        fit_linear(
            batches,
            layer,
            lambda b, name=name: _look(ours, name, b["features_s"])[0],  # type: ignore[misc]
            lambda b, name=name: _look(theirs, name, b["features_t"])[1],  # type: ignore[misc]
            solving,
            prior,
        )


def _calls(head: nn.Module, features: Sequence[Tensor]) -> list[str]:
    """Names of a head's convolutions in execution order."""
    order: list[str] = []
    convolutions = [(name, module) for name, module in head.named_modules() if isinstance(module, nn.Conv2d)]
    handles = [module.register_forward_hook(lambda *_, name=name: order.append(name)) for name, module in convolutions]
    try:
        head(features)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _look(head: nn.Module, name: str, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Input and output of a layer when the head runs."""
    seen: list[Any] = []
    handle = head.get_submodule(name).register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    try:
        head(features)
    finally:
        handle.remove()
    return seen[-1]

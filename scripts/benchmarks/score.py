"""The subcommand ``score``: losses and evaluation at the labels' size, compared with plain PyTorch."""

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from benchmarks import measure
from transkd.errors import UserError
from transkd.losses import TaskCrossEntropy, TaskDice, TaskFocal, TaskOHEM
from transkd.metrics import SegmentationScore
from transkd.outputs import SegmentationOutput

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5  # relative
IGNORE = 255

Loss = Callable[[Tensor, Tensor], Tensor]
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(term: nn.Module, compiled: str | None = None) -> Run:
    """Return a function of logits and labels: value and gradient by a term of transkd."""
    called = torch.compile(term, mode=compiled) if compiled else term
    return with_gradient(lambda logits, target: called(SegmentationOutput(logits, (), (), logits), None, target))


def plain(loss: Loss) -> Run:
    """Return a function of logits and labels: value and gradient by PyTorch's autograd, with upsampled logits."""

    def upsampled(logits: Tensor, target: Tensor) -> Tensor:
        size = target.shape[-2:]
        return loss(F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False), target)

    return with_gradient(upsampled)


def with_gradient(loss: Loss) -> Run:
    """Return a function that gives a loss and its gradient with respect to the logits."""

    def run(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.detach().requires_grad_()
        value = loss(logits, target)
        value.backward()
        return value.detach(), logits.grad

    return run


def plain_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the labelled pixels."""
    return F.cross_entropy(logits, target, ignore_index=IGNORE)


def plain_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss with γ = 2."""
    losses = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    return ((1 - (-losses).exp()).square() * losses).sum() / (target != IGNORE).sum()


def plain_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss of the classes that occur."""
    valid = (target != IGNORE)[:, None]
    predicted = logits.softmax(1) * valid
    labels = F.one_hot(target.where(valid[:, 0], 0), logits.shape[1]).movedim(-1, 1) * valid
    both, total = (predicted * labels).sum((0, 2, 3)), predicted.sum((0, 2, 3)) + labels.sum((0, 2, 3))
    return (1 - 2 * both / total)[labels.any(3).any(2).any(0)].mean()


def plain_ohem(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the pixels with a probability below 0.7, and at least of the hardest sixteenth."""
    losses = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")[target != IGNORE]
    hardest = losses.topk(math.ceil(len(losses) / 16)).values
    return losses[losses >= hardest[-1].clamp_max(-math.log(0.7))].mean()


LOSSES: dict[str, tuple[type[nn.Module], Loss]] = {
    "cross-entropy": (TaskCrossEntropy, plain_cross_entropy),
    "focal": (TaskFocal, plain_focal),
    "dice": (TaskDice, plain_dice),
    "ohem": (TaskOHEM, plain_ohem),
}


@torch.no_grad()
def our_confusion(logits: Tensor, target: Tensor) -> Tensor:
    """Confusion matrix [K, K] by transkd's ``SegmentationScore`` at the labels' size."""
    score = SegmentationScore(logits.shape[1], "full-res").to(logits.device)
    score.update(logits, target)
    return score.confmat


@torch.no_grad()
def plain_confusion(logits: Tensor, target: Tensor) -> Tensor:
    """Confusion matrix [K, K] by upsampling, argmax and torchmetrics."""
    upsampled = F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)
    return multiclass_confusion_matrix(
        upsampled.argmax(1), target, logits.shape[1], ignore_index=255, validate_args=False
    )


def compare(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Largest differences between ours and plain PyTorch.

    Raises:
        UserError: the results differ, so timings would not be comparable.
    """
    logits = logits.float()  # of a gradient in bf16 single numbers may be rounded otherwise
    found = {"loss": 0.0, "gradient": 0.0}
    for name, (term, formula) in LOSSES.items():
        pairs = zip(ours(term())(logits, target), plain(formula)(logits, target), strict=True)
        loss, gradient = (((one - other).float().norm() / other.float().norm()).item() for one, other in pairs)
        if not (loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE):
            raise UserError(
                f"{name}: ours and plain differ, the loss by {loss:.1e}, its gradient by {gradient:.1e} (relative), "
                f"expected at most {LOSS_TOLERANCE:.0e} and {GRADIENT_TOLERANCE:.0e}; nothing was timed"
            )
        found = {"loss": max(loss, found["loss"]), "gradient": max(gradient, found["gradient"])}
    found["pixels"] = (our_confusion(logits, target) - plain_confusion(logits, target)).abs().sum().item()
    if found["pixels"]:
        raise UserError(f"the confusion matrices differ by {found['pixels']:.0f} pixels; nothing was timed")
    return found


def score(args: argparse.Namespace) -> None:
    """Losses with gradient at the labels' size, and evaluation at full resolution; compared with plain PyTorch."""
    device, dtype, found = measure.prepare(args)
    height, width = args.size
    logits = torch.randn(args.batch, args.classes, -(-height // 4), -(-width // 4)).to(device, dtype)
    target = torch.randint(0, args.classes, (args.batch, height, width))
    target[torch.rand(target.shape) < 0.1] = 255
    target = target.to(device)
    found["differences"] = compare(logits, target)

    losses: dict[str, Run] = {}
    for name, (term, formula) in LOSSES.items():
        losses |= {f"{name}, ours": ours(term()), f"{name}, plain": plain(formula)}
        if args.compile:
            losses[f"{name}, ours{measure.COMPILED}"] = ours(term(), compiled=args.compile)
    scores = {"scoring, ours": our_confusion, "scoring, plain": plain_confusion}
    costs = []
    for ways in (losses, scores):  # ratios refer to the first of each
        runs = {name: partial(way, logits, target) for name, way in ways.items()}
        costs += measure.measure_costs(runs, args)
    found["rows"] = [cost._asdict() for cost in costs]
    table = measure.as_markdown(
        ("at the labels' size", *measure.COSTS), [[cost.name, *measure.cost_cells(cost)] for cost in costs]
    )
    same = "loss {loss:.0e}, gradient {gradient:.0e} (relative), confusion matrices {pixels:.0f} pixels apart"
    title = f"logits {'×'.join(map(str, logits.shape))} to labels of {height}×{width}"
    measure.report(args, title, found, table, same.format(**found["differences"]))


def add(subparsers: Any) -> None:
    """Add the subcommand and its arguments."""
    parser = measure.add_command(subparsers, score)
    measure.add_image_options(parser, size=(1024, 2048))

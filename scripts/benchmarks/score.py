"""The subcommand ``score``: cross-entropy and evaluation at the labels' size, compared with plain PyTorch."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from benchmarks import measure
from transkd.errors import UserError
from transkd.losses import TaskCrossEntropy
from transkd.metrics import SegmentationScore
from transkd.outputs import SegmentationOutput

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5  # relative


class OurCrossEntropy:
    """Value and gradient by transkd's ``TaskCrossEntropy``."""

    def __init__(self, compiled: str | None = None) -> None:
        term = TaskCrossEntropy(resolution="labels")
        self.term = torch.compile(term, mode=compiled) if compiled else term

    def __call__(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient with respect to the logits."""
        logits = logits.detach().requires_grad_()
        loss = self.term(SegmentationOutput(logits, (), (), logits), None, target)
        loss.backward()
        return loss.detach(), logits.grad


def plain_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Upsample the logits; return the loss and its gradient with respect to the logits."""
    logits = logits.detach().requires_grad_()
    upsampled = F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(upsampled, target, ignore_index=255)
    loss.backward()
    return loss.detach(), logits.grad


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
    """Differences between ours and plain PyTorch.

    Raises:
        UserError: the results differ, so timings would not be comparable.
    """
    (loss, gradient), (plain_loss, plain_gradient) = (
        function(logits, target) for function in (OurCrossEntropy(), plain_cross_entropy)
    )
    found = {
        "loss": ((loss - plain_loss).abs() / plain_loss.abs()).item(),
        "gradient": ((gradient - plain_gradient).float().norm() / plain_gradient.float().norm()).item(),
        "pixels": (our_confusion(logits, target) - plain_confusion(logits, target)).abs().sum().item(),
    }
    if not (found["loss"] <= LOSS_TOLERANCE and found["gradient"] <= GRADIENT_TOLERANCE):
        raise UserError(
            f"the cross-entropies differ: the loss by {found['loss']:.1e}, its gradient by {found['gradient']:.1e} "
            f"(relative), expected at most {LOSS_TOLERANCE:.0e} and {GRADIENT_TOLERANCE:.0e}; nothing was timed"
        )
    if found["pixels"]:
        raise UserError(f"the confusion matrices differ by {found['pixels']:.0f} pixels; nothing was timed")
    return found


def score(args: argparse.Namespace) -> None:
    """Upsampled cross-entropy with gradient, and evaluation at full resolution; compared with plain PyTorch."""
    device, dtype, found = measure.prepare(args)
    height, width = args.size
    logits = torch.randn(args.batch, args.classes, -(-height // 4), -(-width // 4)).to(device, dtype)
    target = torch.randint(0, args.classes, (args.batch, height, width))
    target[torch.rand(target.shape) < 0.1] = 255
    target = target.to(device)
    found["differences"] = compare(logits, target)

    losses = {"ours": OurCrossEntropy(), "plain": plain_cross_entropy}
    if args.compile:
        losses["ours" + measure.COMPILED] = OurCrossEntropy(compiled=args.compile)
    scores = {"ours": our_confusion, "plain": plain_confusion}
    costs = []
    for what, functions in (("cross-entropy", losses), ("scoring", scores)):
        costs += measure_functions(what, functions, logits, target, args)
    found["rows"] = [cost._asdict() for cost in costs]
    table = measure.as_markdown(
        ("at the labels' size", *measure.COSTS), [[cost.name, *measure.cost_cells(cost)] for cost in costs]
    )
    same = "loss {loss:.0e}, gradient {gradient:.0e} (relative), confusion matrices {pixels:.0f} pixels apart"
    title = f"logits {'×'.join(map(str, logits.shape))} to labels of {height}×{width}"
    measure.report(args, title, found, table, same.format(**found["differences"]))


def measure_functions(
    what: str, ways: Mapping[str, Any], logits: Tensor, target: Tensor, args: argparse.Namespace
) -> list[measure.Cost]:
    """Measure the costs of functions of logits and labels; ratios refer to the first."""
    runs = {f"{what}, {name}": lambda way=way: way(logits, target) for name, way in ways.items()}
    return measure.measure_costs(runs, args)


def add(subparsers: Any) -> None:
    """Add the subcommand and its arguments."""
    parser = measure.add_command(subparsers, score)
    measure.add_image_options(parser, size=(1024, 2048))

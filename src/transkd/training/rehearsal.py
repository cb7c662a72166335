"""What is refused before anything long begins."""

import logging

import torch
from torch import Tensor, nn

from transkd.data import SegmentationDataModule
from transkd.data.datamodule import collate
from transkd.errors import UserError
from transkd.losses import Criterion
from transkd.models import Network
from transkd.outputs import SegmentationOutput

__all__ = ["check_schedules", "rehearse", "weigh"]

log = logging.getLogger(__name__)

DOMINANT = 10.0  # times all other terms together


def check_schedules(criterion: Criterion, data: SegmentationDataModule, epochs: int | None, accumulate: int) -> None:
    """Refuse schedules that never turn on, as far as the length of the run is known before there is a trainer.

    The Distiller checks again once Lightning knows the number of steps.

    Args:
        criterion: holds the schedules.
        data: gives the number of batches.
        epochs: ``trainer.max_epochs``; None and -1 leave the length to other settings.
        accumulate: batches a step.
    """
    epochs = epochs or 0
    batches = len(data.dataset("train")) // data.batch_size
    steps = epochs * -(-batches // accumulate)  # the last batches of an epoch make a step, too
    if steps > 0:
        criterion.check_schedules(steps, epochs)


def rehearse(student: Network, teacher: Network | None, criterion: Criterion, data: SegmentationDataModule) -> None:
    """Run one image through networks and terms: networks that a term cannot pair are refused here.

    Raises:
        UserError: classes differ, a network does not take the image's size, or a term cannot compare the networks.
    """
    if student.num_classes != data.num_classes:
        raise UserError(f"{student.name} gives {student.num_classes} classes, the data has {data.num_classes}")
    if teacher is not None and "logits" in criterion.ever_needs and teacher.num_classes != data.num_classes:
        raise UserError(
            f"a term compares logits, but the teacher {teacher.name} has {teacher.num_classes} classes and the data "
            f"{data.num_classes}; choose terms that read features or embeddings alone (csf, pea, ea, gl_mixer)"
        )
    image, target, _ = collate([data.dataset("train")[0]])
    parts = [part for part in (student, teacher, criterion) if part is not None]
    modes = [part.training for part in parts]
    with torch.no_grad(), torch.random.fork_rng():
        ours, theirs = (part and _shown(part.eval(), image) for part in (student, teacher))
        criterion.eval()(ours, theirs, target.long())
    for part, mode in zip(parts, modes, strict=True):
        part.train(mode)


def weigh(student: Network, teacher: nn.Module | None, criterion: Criterion, data: SegmentationDataModule) -> None:
    """Log each term's weighted value on one batch, and warn of a term that drowns the others.

    Args:
        student: with its first weights.
        teacher: the frozen teacher.
        criterion: the terms; those off at first or of automatic weight are left out.
        data: gives the first training images.
    """
    dataset = data.dataset("train")
    batch = collate([dataset[i] for i in range(min(2, data.batch_size, len(dataset)))])
    modes = [part.training for part in (student, criterion)]
    with torch.no_grad(), torch.random.fork_rng():
        ours = _shown(student.eval(), batch.image)
        theirs = teacher(batch.image) if teacher is not None and criterion.needs else None
        values = criterion.eval()(ours, theirs, batch.target.long()).values
    for part, mode in zip((student, criterion), modes, strict=True):
        part.train(mode)
    fixed = criterion.weights
    weighted = {name: weight * value.item() for name, value in values.items() if (weight := fixed[name]) is not None}
    log.info("terms before step 1: %s", ", ".join(f"{name} {value:.3g}" for name, value in weighted.items()))
    for name, value in weighted.items():
        others = sum(weighted.values()) - value
        if len(weighted) > 1 and value > DOMINANT * others > 0:
            log.warning(
                "the term %s is %.0f times all other terms together, so the student follows it alone: lower "
                "criterion.terms.%s.weight, set it by its gradient ('auto(0.5)'), or bring the teacher's features "
                "to the usual scale with teacher.standardise=true",
                name,
                value / others,
                name,
            )


def _shown(network: Network, image: Tensor) -> SegmentationOutput:
    """A network's output for an image; a size that it does not take is the user's mistake."""
    try:
        return network(image)
    except (RuntimeError, AssertionError) as error:
        height, width = image.shape[-2:]
        raise UserError(
            f"{network.name} cannot take an image of {height}×{width} as the data gives it ({error}). A network of "
            "fixed size needs its own: change the crop in data.train_transform, or the network's img_size "
            "(student.network.encoder, teacher.network.encoder)"
        ) from error

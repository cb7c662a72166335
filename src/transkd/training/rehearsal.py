"""Checks before anything long begins, of a run and of the command ``check``."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transkd.data import SegmentationDataModule
from transkd.data.datamodule import collate
from transkd.data.geometry import class_of_padding
from transkd.errors import UserError
from transkd.losses import Criterion
from transkd.models import Network
from transkd.models.storage.card import describe
from transkd.outputs import SegmentationOutput
from transkd.settings import TrainerSettings

__all__ = [
    "check_labels",
    "check_schedules",
    "class_problems",
    "dominating",
    "planned_steps",
    "rehearse",
    "rehearse_writing",
    "values_on_one_batch",
    "warn_of_padding",
    "weigh",
    "weighted",
]

log = logging.getLogger(__name__)

DOMINANT = 10.0  # ratio to the sum of all other terms from which a term is warned of


def planned_steps(data: SegmentationDataModule, trainer: TrainerSettings) -> int | None:
    """Optimizer steps of a run on one device; None if ``max_epochs`` and ``max_steps`` do not limit it."""
    if trainer.fast_dev_run:
        return int(trainer.fast_dev_run)
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if (trainer.max_epochs or -1) > 0:
        limits.append((trainer.max_epochs or 0) * _steps_of_an_epoch(data, trainer))
    return min(limits, default=None)


def _steps_of_an_epoch(data: SegmentationDataModule, trainer: TrainerSettings) -> int:
    batches = data.batches()
    limit = trainer.limit_train_batches
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return -(-batches // trainer.accumulate_grad_batches)  # the remaining batches of an epoch are a step too


def check_schedules(criterion: Criterion, data: SegmentationDataModule, trainer: TrainerSettings) -> None:
    """Check that every schedule turns on, if the length of the run is known before a trainer is built.

    The Distiller checks again with Lightning's number of steps.

    Raises:
        UserError: a schedule never turns on.
    """
    steps = planned_steps(data, trainer)
    if steps:
        epochs = 1 if trainer.fast_dev_run else steps / max(1, _steps_of_an_epoch(data, trainer))
        criterion.check_schedules(steps, epochs)


def class_problems(
    student: Network, teacher: Network | None, criterion: Criterion, data: SegmentationDataModule
) -> list[str]:
    """One line for each network whose classes do not fit the data."""
    problems = []
    if student.num_classes != data.num_classes:
        problems.append(f"{student.name} has {student.num_classes} classes, the data has {data.num_classes}")
    if teacher is not None and "logits" in criterion.ever_needs and teacher.num_classes != data.num_classes:
        problems.append(
            f"a term compares logits, but the teacher {teacher.name} has {teacher.num_classes} classes and the data "
            f"{data.num_classes}; map its classes with teacher.class_map, or choose terms that read only features or "
            "embeddings (csf, pea, ea, gl_mixer)"
        )
    return problems


def rehearse(
    student: Network, teacher: Network | None, criterion: Criterion, data: SegmentationDataModule
) -> tuple[SegmentationOutput, SegmentationOutput | None, Tensor]:
    """Run one image through networks and terms, to find networks that do not fit each other, a term or the data.

    Returns:
        The student's and the teacher's outputs, and the label int64 [1, H, W].

    Raises:
        UserError: the data is not as its settings say, classes differ, a network does not accept the image's size, or a
            term cannot compare the networks, or the first validation images make no batch.
    """
    for problem in class_problems(student, teacher, criterion, data):
        raise UserError(problem)
    if getattr(data, "unlabelled", None) is not None and not criterion.ever_needs:
        raise UserError(
            "data.unlabelled gives images without labels, but no term reads the teacher, so nothing is learnt from "
            "them: add a term such as 'term=[kd]' or 'term=[teacher_labels]', or set data.unlabelled=null"
        )
    data.check_batch_size()
    for split in ("train", "val"):  # a validation transform that cannot be undone is refused now, not after an epoch
        data.dataset(split).check()
    val = data.dataset("val")
    collate([val[i] for i in range(min(getattr(data, "eval_batch_size", 1), len(val)))])
    warn_of_padding(data)
    image, target, *_ = collate([data.dataset("train")[0]])
    parts = [part for part in (student, teacher, criterion) if part is not None]
    modes = [part.training for part in parts]
    with torch.no_grad(), torch.random.fork_rng():
        ours = _shown(student.eval(), image)
        theirs = None if teacher is None else _shown(teacher.eval(), image)
        criterion.eval()(ours, theirs, target.long())
    for part, mode in zip(parts, modes, strict=True):
        part.train(mode)
    return ours, theirs, target.long()


def warn_of_padding(data: SegmentationDataModule) -> None:
    """Warn if the training transform labels padding as a class, which is what Albumentations does by default."""
    dataset = data.dataset("train")
    if getattr(dataset, "transform", None) is None or not hasattr(dataset, "read"):
        return
    padding = class_of_padding(dataset.transform, dataset.read(0)[0])
    if padding is not None and padding < len(data.classes.names):
        log.warning(
            "data.train_transform labels what it adds to an image as %s, class %d: set fill_mask: 255 where it pads, "
            "unless that is meant",
            data.classes.names[padding],
            padding,
        )


def check_labels(criterion: Criterion, data: SegmentationDataModule) -> None:
    """Check that some pixel of each split has a class; reads images until the first one with such a pixel.

    Raises:
        UserError: all training pixels are void although the task has a weight, or all validation pixels are.
    """
    splits = ["val"] if criterion.fixed.get("task") == 0 else ["train", "val"]
    for split in splits:
        dataset = data.dataset(split)
        if not any(bool((dataset[i][1] < data.num_classes).any()) for i in range(len(dataset))):
            hint = "" if split == "val" else ", or switch the task off with criterion.terms.task.weight=0"
            raise UserError(
                f"no pixel of the {len(dataset)} {split} images has a class: every label is 255 or in "
                f"data.void={list(data.void)}; check the labels and data.void{hint}"
            )


def rehearse_writing(student: Network, notes: dict[str, Any], facts: dict[str, Any]) -> None:
    """Serialise what the run writes at its end, as far as it is known.

    Args:
        student: is described in its weights file.
        notes: entries of that description.
        facts: entries of ``results.json``.

    Raises:
        UserError: an entry cannot be written as JSON; names it.
    """
    for file, content in (("student.safetensors", describe(student, **notes)), ("results.json", facts)):
        for key, value in content.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{file} could not be written at the end of the run: its entry {key} holds what is neither text, "
                    f"number, list nor mapping ({error}); look where the configuration, a transform or a network of "
                    "your own sets it"
                ) from error


def values_on_one_batch(
    student: Network, teacher: nn.Module | None, criterion: Criterion, data: SegmentationDataModule
) -> dict[str, Tensor]:
    """Values of the terms on the first training images with labels, at most two, with all networks in eval mode.

    Args:
        student: the student with its initial weights.
        teacher: the frozen teacher.
        criterion: the terms; those that are off at first are left out.
        data: provides the images.
    """
    dataset = data.dataset("train")
    batch = collate([dataset[i] for i in range(min(2, data.batch_size, dataset.labelled))])
    modes = [part.training for part in (student, criterion)]
    with torch.random.fork_rng():
        ours = _shown(student.eval(), batch.image)
        theirs = teacher(batch.image, criterion.needs) if teacher is not None and criterion.needs else None
        values = criterion.eval()(ours, theirs, batch.target.long()).values
    for part, mode in zip((student, criterion), modes, strict=True):
        part.train(mode)
    return values


def weighted(values: Mapping[str, Tensor], criterion: Criterion) -> dict[str, float]:
    """Weight · value of each term; terms with an automatic weight are left out."""
    fixed = criterion.weights
    return {name: weight * value.item() for name, value in values.items() if (weight := fixed[name]) is not None}


def dominating(shares: Mapping[str, float]) -> list[str]:
    """One line for each term whose weighted value dominates the sum of all others."""
    return [
        f"the term {name} is {value / others:.0f} times the sum of all other terms, so it dominates the training: "
        f"lower criterion.terms.{name}.weight, set it by its gradient ('auto(0.5)'), or bring the teacher's features "
        "to the usual scale with teacher.standardise=true"
        for name, value in shares.items()
        if len(shares) > 1 and value > DOMINANT * (others := sum(shares.values()) - value) > 0
    ]


def weigh(student: Network, teacher: nn.Module | None, criterion: Criterion, data: SegmentationDataModule) -> None:
    """Log each term's weighted value on one batch, and warn if one term dominates the others."""
    with torch.no_grad():
        shares = weighted(values_on_one_batch(student, teacher, criterion, data), criterion)
    log.info("terms before step 1: %s", ", ".join(f"{name} {value:.3g}" for name, value in shares.items()))
    for warning in dominating(shares):
        log.warning(warning)


def _shown(network: Network, image: Tensor) -> SegmentationOutput:
    """Run a network on an image; report a size that it does not accept as a user error."""
    try:
        return network(image)
    except (RuntimeError, AssertionError) as error:
        height, width = image.shape[-2:]
        raise UserError(
            f"{network.name} does not accept an image of {height}×{width}, the size of the data ({error}). A network "
            "of fixed size needs that size: change the crop in data.train_transform, or the network's img_size "
            "(student.network.encoder, teacher.network.encoder)"
        ) from error

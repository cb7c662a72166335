"""Evaluate a file of weights."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from transkd.arguments import check_arguments
from transkd.command.folders import enter
from transkd.errors import UserError
from transkd.models import load_segmenter, load_weights
from transkd.models.storage.sources import read_weights
from transkd.report import report_scores
from transkd.settings import EvaluateSettings
from transkd.training.agreement import other_validation, warn_of_moved_classes
from transkd.training.build import build_data, build_side_trainer, enter_protocol, instantiated
from transkd.training.device import device_of
from transkd.training.process import prepare_process
from transkd.training.scoring import score

__all__ = ["evaluate"]

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> None:
    """Evaluate a file of weights on the validation split; print a table and write ``results.json``."""
    settings = EvaluateSettings.read(cfg)
    check_arguments(cfg)
    enter(Path(settings.run_dir), scores_only=True)
    enter_protocol(settings.protocol, settings.protocols)
    prepare_process(settings.keep_freed_memory, device_of(settings.trainer.accelerator))
    data = build_data(cfg)
    weights = read_weights(settings.weights)
    if weights.recipe is not None:
        network, _ = load_segmenter(weights)
    else:
        network = instantiated(cfg.student.network)
        load_weights(network, weights)
    if network.num_classes != data.num_classes:
        raise UserError(
            f"{settings.weights} has {network.num_classes} classes, the data {settings.name} has {data.num_classes}; "
            "choose the experiment that it was trained with"
        )
    warn_of_moved_classes(
        weights.card, data.classes.names, settings.weights, "Choose the data that it was trained with"
    )
    other = other_validation(weights.card, data.eval_transform) if weights.kind == "transkd" else None
    if other is not None:
        log.warning(
            "%s was validated with %s: the scores are not those of its run. If that is not meant, give the settings "
            "of its run, which stand in its config.yaml",
            settings.weights,
            other,
        )
    data.generate()
    data.dataset("val").check()
    trainer = build_side_trainer(cfg)
    scores = score(network, data, settings.protocol, trainer)
    if trainer.is_global_zero:
        report_scores(scores, settings.weights, data.classes.names, settings.protocol, settings.run_dir)

"""One training run, from a composed configuration to a deployable student."""

import copy
import hashlib
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from transkd.cli import save_resolved
from transkd.data import SegmentationDataModule
from transkd.data.datamodule import collate
from transkd.errors import UserError
from transkd.losses import Criterion
from transkd.metrics import Scores
from transkd.models import FrozenTeacher, Network, add_lora, load_weights, merge_lora, save_segmenter
from transkd.models.initialise import start_from_teacher
from transkd.models.storage.lineage import as_teacher, check_license_policy, merge_lineage
from transkd.models.storage.sources import read_weights
from transkd.outputs import SegmentationOutput
from transkd.report import (
    count_parameters,
    describe_scores,
    print_scores,
    save_report_pictures,
    sha256,
    versions,
    write_results,
)
from transkd.training.device import check_device, compile_parts, in_channels_last, set_memory_format
from transkd.training.distiller import Distiller
from transkd.training.memory import keep_freed_memory

__all__ = ["quiet_lightning", "run", "score"]

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Build everything, train, score, and write the run's folder."""
    started = time.time()
    run_dir = Path(cfg.run_dir)
    ckpt_path = find_checkpoint(cfg)
    quiet_lightning()
    torch.set_float32_matmul_precision("high")
    if cfg.keep_freed_memory:
        keep_freed_memory()
    check_device(cfg)
    L.seed_everything(cfg.seed, verbose=False)

    data: SegmentationDataModule = instantiate(cfg.data)
    student = build_student(cfg)  # before the teacher: its start must not depend on one
    criterion, teacher_network = build_criterion(cfg, student)
    set_memory_format(cfg, student, teacher_network, criterion)
    if getattr(rank_zero_only, "rank", 0) == 0:
        save_resolved(cfg, run_dir / "config.yaml")
        data.prepare_data()
    data.dataset("train"), data.dataset("val")  # a mistake in the data shows here, before anything long
    log_sizes(cfg, student, criterion)
    check_schedules(cfg, criterion, data)
    rehearse(student, teacher_network, criterion, data)

    teacher, teacher_scores = None, None
    notes: dict[str, Any] = {"experiment": cfg.name, "eval_transform": serialise(data.eval_transform)}
    if teacher_network is not None and criterion.ever_needs:
        notes |= prepare_teacher(cfg, teacher_network, data)
        teacher_scores = check_teacher(cfg, teacher_network, data)
        teacher = FrozenTeacher(teacher_network, criterion.ever_needs)
        if cfg.student.from_teacher:
            start_from_teacher(student, teacher_network)
        student.lineage = merge_lineage(student.lineage, as_teacher(teacher_network.lineage))
    elif cfg.student.from_teacher:
        raise UserError("student.from_teacher=true, but no term reads a teacher; choose one with distill=…")

    adapt(cfg, student)
    compile_parts(cfg, criterion, student, teacher_network)
    distiller = Distiller(student, criterion, data.classes, teacher, notes=notes, **training_settings(cfg))
    trainer = build_trainer(cfg)
    fit(trainer, distiller, data, ckpt_path)

    merge_lora(student)
    scores = score(cfg, student, data)
    if not trainer.is_global_zero:
        return
    deployed = run_dir / "student.safetensors"
    save_segmenter(student, deployed, data.classes, **notes)
    about_teacher = {key: value for key, value in notes.items() if key.startswith("teacher_")}
    results = {
        **describe_scores(scores, cfg.protocol, data.classes.names),
        "teacher": about_teacher | describe_scores(teacher_scores, cfg.protocol, data.classes.names),
        "name": cfg.name,
        "terms": criterion.weights,
        "seed": cfg.seed,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "minutes": round((time.time() - started) / 60, 2),
        "parameters": count_parameters(student, criterion),
        "resumed_from": ckpt_path,
        "sha256": {deployed.name: sha256(deployed)},
        "versions": versions(),
    }
    write_results(results, run_dir)
    networks = {"teacher": teacher_network if teacher is not None else None, "student": student}
    save_report_pictures(run_dir, data, networks, cfg.pictures)
    print_scores({"teacher": teacher_scores, "student": scores}, data.classes.names, cfg.protocol)
    log.info("the deployable student is %s", deployed)


def find_checkpoint(cfg: DictConfig) -> str | None:
    """The checkpoint to go on from; ``last`` is the newest one of this experiment."""
    if cfg.ckpt_path is None:
        return None
    path = Path(cfg.ckpt_path)
    if cfg.ckpt_path == "last":
        folder = Path("outputs") / cfg.name
        found = sorted(folder.glob("**/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"ckpt_path=last: no checkpoints/last.ckpt in any run under {folder.absolute()}")
        path = found[-1]
    if not read_weights(path).card.get("transkd_version"):  # a missing or damaged file shows in reading
        raise UserError(
            f"ckpt_path={path} is no checkpoint of a run; to start from its weights say student.weights={path}"
        )
    log.info("going on from %s", path)
    return str(path)


def build_student(cfg: DictConfig) -> Network:
    """The student with the weights that it starts from."""
    if cfg.student.lora.rank is not None and cfg.student.weights is None and not cfg.student.from_teacher:
        raise UserError(
            f"student.lora.rank={cfg.student.lora.rank} adapts weights that are there, but the student starts from "
            "random ones; name some with student.weights=PATH, or copy the teacher's with student.from_teacher=true"
        )
    student: Network = instantiate(cfg.student.network)
    if cfg.student.weights is not None:
        load_weights(student, cfg.student.weights, cfg.student.classifier, cfg.student.license)
    check_license_policy(student.lineage, cfg.license_policy, f"the student {student.name}")
    if cfg.student.checkpointing:
        student.checkpoint_activations()
    return student


def adapt(cfg: DictConfig, student: Network) -> None:
    """Where low-rank terms are asked for, train them and leave the student's weights as they are."""
    lora = cfg.student.lora
    if lora.rank is not None:
        add_lora(student, lora.rank, lora.train, lora.keep_drop_path)


def build_criterion(cfg: DictConfig, student: Network) -> tuple[Criterion, Network | None]:
    """The criterion, and the teacher's network where there are terms beside the task's."""
    cfg.channels.student = list(student.channels)
    teacher = None
    cfg.channels.teacher = []
    if len(cfg.criterion.terms) > 1:
        teacher = instantiate(cfg.teacher.network)
        cfg.channels.teacher = list(teacher.channels)
    return instantiate(cfg.criterion), teacher


def check_schedules(cfg: DictConfig, criterion: Criterion, data: SegmentationDataModule) -> None:
    """See that schedules turn on, as far as it can be told before there is a trainer: in the most steps there can be.

    The Distiller looks again once the number of steps is known.
    """
    epochs = cfg.trainer.max_epochs or 0  # null and -1 leave the length to other settings
    batches = len(data.dataset("train")) // data.batch_size
    steps = epochs * -(-batches // cfg.trainer.accumulate_grad_batches)  # the last ones of an epoch make a step, too
    if steps > 0:
        criterion.check_schedules(steps, epochs)


def rehearse(student: Network, teacher: Network | None, criterion: Criterion, data: SegmentationDataModule) -> None:
    """One image through everything before anything long begins: networks that a term cannot pair show here."""
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
        ours, theirs = (part and show(part.eval(), image) for part in (student, teacher))
        criterion.eval()(ours, theirs, target.long())
    for part, mode in zip(parts, modes, strict=True):
        part.train(mode)


def show(network: Network, image: torch.Tensor) -> SegmentationOutput:
    """A network's output for an image, or a word on its size."""
    try:
        return network(image)
    except (RuntimeError, AssertionError) as error:
        height, width = image.shape[-2:]
        raise UserError(
            f"{network.name} cannot take an image of {height}×{width} as the data gives it ({error}). A network of "
            "fixed size needs its own: change the crop in data.train_transform, or the network's img_size "
            "(student.network.encoder, teacher.network.encoder)"
        ) from error


def training_settings(cfg: DictConfig) -> dict[str, Any]:
    """What every Distiller of this run is built with."""
    return {
        "optimizer": instantiate(cfg.optim.optimizer),
        "scheduler": instantiate(cfg.optim.scheduler),
        "interval": cfg.optim.interval,
        "horizon": cfg.optim.horizon,
        "protocol": cfg.protocol,
        "gradients_every": cfg.gradients_every,
        "seed": cfg.seed,
        "channels_last": in_channels_last(cfg),
        "compiled": bool(cfg.compile),
    }


def build_trainer(cfg: DictConfig, **changes: Any) -> L.Trainer:
    """Lightning's Trainer with the configured callbacks and loggers, unless ``changes`` say otherwise."""
    parts: dict[str, Any] = {
        "callbacks": lambda: [instantiate(part) for part in cfg.callbacks.values()],
        "logger": lambda: [instantiate(part) for part in cfg.logger.values()],
    }
    built = {name: make() for name, make in parts.items() if name not in changes}
    return instantiate(cfg.trainer, **{**built, **changes})


def build_side_trainer(cfg: DictConfig, **changes: Any) -> L.Trainer:
    """The same Trainer, writing nothing: for scores and for the teacher's own training."""
    progress = [instantiate(cfg.callbacks.progress)] if "progress" in cfg.callbacks else []
    return build_trainer(cfg, callbacks=progress, logger=False, enable_checkpointing=False, **changes)


def fit(trainer: L.Trainer, distiller: Distiller, data: SegmentationDataModule, ckpt_path: str | None = None) -> None:
    """Train to the end, or stop with a word on how to go on."""
    try:
        trainer.fit(distiller, datamodule=data, ckpt_path=ckpt_path)
    except RuntimeError as error:
        if ckpt_path is None or "loading state_dict" not in str(error):
            raise
        details = " ".join(str(error).split())[:300]
        raise UserError(
            f"ckpt_path={ckpt_path} is of a run with another student, other terms or another student.lora; go on with "
            f"that run's settings, {Path(ckpt_path).parents[1] / 'config.yaml'} ({details} …)"
        ) from error
    if trainer.interrupted:
        raise UserError(f"interrupted at epoch {trainer.current_epoch}; go on with ckpt_path=last")


def score(cfg: DictConfig, network: Network, data: SegmentationDataModule) -> Scores:
    """Score a network on the validation split under the configured protocol."""
    distiller = Distiller(network, Criterion({}), data.classes, protocol=cfg.protocol)
    trainer = build_side_trainer(cfg)
    was_training = network.training
    trainer.validate(distiller, datamodule=data, verbose=False)
    network.train(was_training)
    assert distiller.scores is not None
    return distiller.scores


def prepare_teacher(cfg: DictConfig, network: Network, data: SegmentationDataModule) -> dict[str, Any]:
    """Give the teacher its weights, training it first where that is asked for; says where they come from."""
    path = cfg.teacher.weights
    if path is None:
        path = fit_teacher(cfg, network, data)
    load_weights(network, path, license=cfg.teacher.license)
    check_license_policy(network.lineage, cfg.license_policy, f"the teacher {network.name}")
    return {"teacher_weights": str(path), "teacher_sha256": sha256(Path(path)), "teacher_name": network.name}


def fit_teacher(cfg: DictConfig, network: Network, data: SegmentationDataModule) -> Path:
    """Train the teacher under the student's recipe and keep it; a later run with the same settings finds it."""
    if not cfg.teacher.fit.max_epochs:
        raise UserError(
            "the terms read a teacher, but teacher.weights is not given: name the file with teacher.weights=PATH, "
            "train it first with teacher.fit.max_epochs=N, or train the student alone with distill=none"
        )
    recipe = [cfg.data, cfg.teacher.network, cfg.teacher.fit, cfg.optim, cfg.criterion.terms.task.term]
    resolved = [OmegaConf.to_container(part, resolve=True) for part in recipe]
    key = hashlib.sha256(json.dumps([resolved, cfg.seed], sort_keys=True).encode()).hexdigest()[:12]
    path = Path(cfg.teacher.fit.folder) / f"{cfg.name}_{network.name}_{key}.safetensors"
    if path.is_file():
        log.info("teacher: using %s, trained by an earlier run with the same settings", path)
        return path
    log.info("teacher: training %s for %d epochs first", network.name, cfg.teacher.fit.max_epochs)
    task = Criterion({"task": {"term": instantiate(cfg.criterion.terms.task.term), "weight": 1.0}})
    compile_parts(cfg, task, network)
    distiller = Distiller(network, task, data.classes, **training_settings(cfg))
    trainer = build_side_trainer(cfg, max_epochs=cfg.teacher.fit.max_epochs)
    fit(trainer, distiller, data)
    if trainer.is_global_zero:
        notes = {"experiment": f"{cfg.name}, teacher", "eval_transform": serialise(data.eval_transform)}
        save_segmenter(network, path, data.classes, **notes)
    trainer.strategy.barrier("teacher saved")
    log.info("teacher: kept as %s; later runs with the same settings use it", path)
    return path


def check_teacher(cfg: DictConfig, network: Network, data: SegmentationDataModule) -> Scores | None:
    """Score the teacher; a teacher that knows nothing stops the run."""
    if network.num_classes != data.num_classes:
        log.info("teacher: not scored, since it has %d classes and the data %d", network.num_classes, data.num_classes)
        return None
    scores = score(cfg, network, data)
    log.info("teacher: mIoU %.2f %% (%s)", 100 * scores.miou, cfg.protocol)
    if not scores.miou >= cfg.teacher.min_miou:
        raise UserError(
            f"the teacher reaches only mIoU {scores.miou:.3f} on the validation split, below "
            f"teacher.min_miou={cfg.teacher.min_miou}: wrong weights, classes or normalisation? "
            "Lower teacher.min_miou if it is meant to be so"
        )
    return scores


def log_sizes(cfg: DictConfig, student: Network, criterion: Criterion) -> None:
    """Say what is deployed, what is dropped after training and, of a student to be adapted, what is trained."""
    count = count_parameters(student, criterion)
    log.info(
        "student: %.2f M parameters; with the training modules %.2f M, which are not deployed",
        count["student"] / 1e6,
        sum(count.values()) / 1e6,
    )
    if cfg.student.lora.rank is not None:
        adapted = copy.deepcopy(student)  # itself only once its weights are there; what does not fit shows here
        adapt(cfg, adapted)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        log.info(
            "student: %.2f M parameters are trained: low-rank terms, which are merged into the weights, and %s",
            trained / 1e6,
            ", ".join(cfg.student.lora.train) or "nothing else",
        )


def serialise(transform: Any) -> dict[str, Any] | None:
    """An Albumentations composition as JSON holds it, so that a file of weights can carry its preprocessing."""
    return transform.to_dict() if transform is not None else None


def quiet_lightning() -> None:
    """Leave out what Lightning says at every start, and warnings that concern no user of ours."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        ".*treespec, LeafSpec.*",
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*logs directory .* exists and is not empty.*",  # the run's folder holds config.yaml before metrics.csv
        ".*in eval mode at the start of training.*",  # the teacher, for good
    ):
        warnings.filterwarnings("ignore", text)

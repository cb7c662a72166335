"""Resume a run: find its checkpoint, check that it is whole, and compare its settings with the present ones."""

import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from transkd.command.yaml_files import load_config
from transkd.errors import UserError
from transkd.files import read_tensor_file
from transkd.models.storage.card import CARD
from transkd.settings import TrainerSettings, TrainSettings
from transkd.training.leftovers import remove_leftovers, runs_of

__all__ = [
    "Checkpoint",
    "check_length",
    "check_settings",
    "check_teacher",
    "differences",
    "find_checkpoint",
    "locate",
    "prepare_resuming",
]

log = logging.getLogger(__name__)

NEEDED = ("state_dict", "optimizer_states", "loops", CARD)
LISTED = 6  # differences that a message names
# Settings that change neither what was trained nor how the rest is. The teacher's weights are compared by their hash.
HARMLESS = (
    "run_dir", "name", "ckpt_path", "resume", "channels", "plugins", "license_policy", "pictures", "gradients_every",
    "protocols",
    "keep_freed_memory", "compile", "compile_regions", "channels_last", "logger",
    "callbacks.progress", "callbacks.learning_rate", "callbacks.last", "callbacks.best",
    "data.root", "data.num_workers", "data.eval_batch_size", "data.cache", "data.augment",
    "student.checkpointing", "student.license",
    "teacher.weights", "teacher.license", "teacher.min_miou", "teacher.fit",
    *(f"trainer.{name}" for name in (
        "default_root_dir", "accelerator", "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "logger",
        "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "log_every_n_steps", "profiler",
        "check_val_every_n_epoch", "limit_val_batches", "num_sanity_val_steps", "inference_mode", "benchmark",
        "detect_anomaly", "use_distributed_sampler", "plugins",
    )),
)  # fmt: skip
PLACES = ("run_dir", "name", "ckpt_path", "resume", "channels", "callbacks", "logger", "trainer.default_root_dir")
OUR_SCHEDULE = ("transkd.training.learning_rate.warmup_poly", "transkd.schedules.warmup_poly")  # and its earlier name


class Checkpoint(NamedTuple):
    """A checkpoint to resume from.

    Attributes:
        path: the file.
        card: description of student and run in it.
        epochs: completed epochs.
        steps: completed optimizer steps.
    """

    path: Path
    card: dict[str, Any]
    epochs: int
    steps: int


def prepare_resuming(cfg: DictConfig, settings: TrainSettings) -> Checkpoint | None:
    """Find and check the checkpoint to resume, and remove what killed runs left half written beside it and the run.

    Raises:
        UserError: there is no such checkpoint, it is damaged or longer than the run, or of a run with other settings.
    """
    checkpoint = find_checkpoint(settings.ckpt_path, settings.name)
    runs = [Path(settings.run_dir), *runs_of(settings.name)]
    if checkpoint is not None:
        runs.append(checkpoint.path.absolute().parents[1])
        check_settings(cfg, checkpoint, settings.resume == "force")
        check_length(checkpoint, settings.trainer)
    if getattr(rank_zero_only, "rank", 0) == 0:
        for run in runs:
            remove_leftovers(run)
    return checkpoint


def locate(ckpt_path: str | None, experiment: str) -> Path | None:
    """Return the file that ``ckpt_path`` names: itself, a run's last one, or for ``last`` that of the newest run.

    Raises:
        UserError: there is none.
    """
    if ckpt_path is None:
        return None
    path = _newest(experiment) if ckpt_path == "last" else Path(ckpt_path)
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise UserError(
            f"ckpt_path={ckpt_path}: there is no file {path}; expected a checkpoint, the folder of a run, or last"
        )
    return path


def find_checkpoint(ckpt_path: str | None, experiment: str) -> Checkpoint | None:
    """Find the checkpoint to resume from and check that it is whole.

    Args:
        ckpt_path: a checkpoint, the folder of a run for its last one, or ``last`` for the newest run of the experiment.
        experiment: name of the experiment.

    Raises:
        UserError: there is none, it is damaged, or the file is not a checkpoint of a run.
    """
    path = locate(ckpt_path, experiment)
    if path is None:
        return None
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"ckpt_path={path} is no checkpoint of a run, or only a part of one; give another checkpoint, or start "
            f"from weights with student.weights={path}"
        )
    try:
        content, _ = read_tensor_file(path)
    except UserError as error:
        other = path.with_name("best.ckpt")
        raise UserError(f"ckpt_path: {error}, or give another checkpoint of the run, such as {other}") from error
    absent = [key for key in NEEDED if not isinstance(content, Mapping) or key not in content]
    if absent:
        raise UserError(
            f"ckpt_path={path} is no checkpoint of a run; to start from its weights use student.weights={path}"
        )
    progress = content["loops"]["fit_loop"]["epoch_progress"]["current"]
    log.info("resuming from %s, after %d epochs", path, progress["processed"])
    return Checkpoint(path, dict(content[CARD]), int(progress["processed"]), int(content["global_step"]))


def _newest(experiment: str) -> Path:
    folder = Path("outputs") / experiment
    found = sorted(folder.glob("**/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"ckpt_path=last: no checkpoints/last.ckpt in any run under {folder.absolute()}")
    return found[-1]


def check_length(checkpoint: Checkpoint, trainer: TrainerSettings) -> None:
    """Check that the run is not shorter than what is done.

    Raises:
        UserError: it is.
    """
    for name, limit, done in (
        ("max_epochs", trainer.max_epochs, checkpoint.epochs),
        ("max_steps", trainer.max_steps, checkpoint.steps),
    ):
        if limit is not None and 0 <= limit < done:
            raise UserError(
                f"trainer.{name}={limit}, but {checkpoint.path} has {done} of them done; expected {done} or more. Its "
                "student as it is: python -m transkd.evaluate or transkd.export with weights=" + str(checkpoint.path)
            )
        if limit == done:
            log.info("trainer.%s=%d are done: nothing is left to train", name, limit)


def check_settings(cfg: DictConfig, checkpoint: Checkpoint, force: bool) -> None:
    """Compare the settings with those of the checkpoint's run, in the ``config.yaml`` of its folder.

    Args:
        cfg: the present configuration.
        checkpoint: the checkpoint to resume from.
        force: go on although settings differ that change what was trained.

    Raises:
        UserError: such settings differ and ``force`` is false; names them.
    """
    file = checkpoint.path.absolute().parents[1] / "config.yaml"
    try:
        earlier: Any = OmegaConf.to_container(load_config(file), resolve=True)
    except FileNotFoundError:
        log.warning("resuming: there is no %s, so the settings are not compared with those of that run", file)
        return
    except Exception as error:  # a damaged file raises various types
        if force:
            return
        raise UserError(f"{file} is not readable ({' '.join(str(error).split())}); go on with resume=force") from error
    found = differences(earlier, _resolved_like(cfg, earlier))
    breaking = {key: pair for key, pair in found.items() if not (_is_harmless(key, cfg) or _is_rule(key, *pair))}
    shown = {key: pair for key, pair in found.items() if key not in breaking and not _within(key, PLACES)}
    if shown:
        log.info("resuming with other settings, which do not change what was trained: %s", _listed(shown))
    if breaking and not force:
        raise UserError(
            f"ckpt_path={checkpoint.path} is of a run with other settings: {_listed(breaking)}. Give that run's "
            f"settings ({file}), start a new run with student.weights={checkpoint.path}, or go on: resume=force"
        )
    if breaking:
        log.warning("resume=force: going on with other settings than the run began with: %s", _listed(breaking))


def check_teacher(checkpoint: Checkpoint, about: Mapping[str, Any], force: bool) -> None:
    """Check that the teacher is the one that the checkpoint's run had, by the hash of its weights.

    Raises:
        UserError: it is another one and ``force`` is false.
    """
    before, now = checkpoint.card.get("teacher_sha256"), about.get("teacher_sha256")
    if before is None or before == now:
        return
    message = (
        f"the teacher {about.get('teacher_weights')} is not the one that {checkpoint.path} was trained with, "
        f"{checkpoint.card.get('teacher_weights')}: their SHA-256 differ"
    )
    if not force:
        raise UserError(f"{message}. Give that file with teacher.weights=PATH, or go on with another: resume=force")
    log.warning("resume=force: %s", message)


def differences(earlier: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by name: the earlier value and the present one; a missing one is None.

    Example:
        >>> differences({"seed": 0, "optim": {"lr": 0.1}, "old": None}, {"seed": 0, "optim": {"lr": 0.2}})
        {'optim.lr': (0.1, 0.2)}
    """
    if isinstance(earlier, dict) and isinstance(now, dict):
        names = [*earlier, *(name for name in now if name not in earlier)]
        parts = [(name, earlier.get(name), now.get(name)) for name in names]
    elif isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        parts = [(i, *pair) for i, pair in enumerate(zip(earlier, now, strict=True))]
    else:
        return {} if earlier == now else {key: (earlier, now)}
    found: dict[str, tuple[Any, Any]] = {}
    for name, one, other in parts:
        found |= differences(one, other, f"{key}.{name}" if key else str(name))
    return found


def _resolved_like(cfg: DictConfig, earlier: dict[Any, Any]) -> Any:
    """Plain values of a configuration, with the channels of an earlier run, since its networks are not built yet."""
    cfg = cfg.copy()
    cfg.channels = earlier.get("channels")
    return OmegaConf.to_container(cfg, resolve=True)


def _is_harmless(key: str, cfg: DictConfig) -> bool:
    if key in ("trainer.max_epochs", "trainer.max_steps"):  # torch's schedules store their own length
        scheduler = cfg.optim.scheduler
        return scheduler is None or cfg.optim.horizon is not None or scheduler.get("_target_") in OUR_SCHEDULE
    return _within(key, HARMLESS)


def _is_rule(key: str, before: Any, now: Any) -> bool:
    """Whether a rule for class weights stands for the numbers that it gave to the earlier run."""
    return key.endswith(".class_weights") and isinstance(before, list) and isinstance(now, str)


def _within(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _listed(found: Mapping[str, tuple[Any, Any]]) -> str:
    parts = [f"{key} was {_shown(before)}, is {_shown(now)}" for key, (before, now) in found.items()]
    more = f"; and {len(parts) - LISTED} more" if len(parts) > LISTED else ""
    return "; ".join(parts[:LISTED]) + more


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else shorten(json.dumps(value), 60, placeholder=" …")

"""Every file in conf/ composes and builds; a new one is picked up by itself."""

import re
import shlex

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

from transkd.cli import CONF
from transkd.data import SegmentationDataModule
from transkd.losses import Criterion
from transkd.training.build import build_criterion, build_teacher, build_trainer

ROOTS = sorted(path.stem for path in CONF.glob("*.yaml"))
OPTIONS = sorted(
    (path.relative_to(CONF).parent.as_posix(), path.stem)
    for path in CONF.glob("*/**/*.yaml")
    if not path.stem.startswith("_")  # what the options of a group share
)
# options that ask for what the user alone can know, and for which value of the network
OPEN_ENDED = {"timm": "name", "module": "module"}
OWN = ("data=folder", "data=coco", "data=yolo")  # options that ask for classes
EXPERIMENTS = [option for group, option in OPTIONS if group == "experiment"]


@pytest.fixture
def composed(tmp_path):
    """Compose a command's configuration; what every run must give is given."""

    def composed(*overrides, config="train"):
        given = [f"run_dir={tmp_path}", f"data.root={tmp_path / 'data'}", "teacher.weights=teacher.safetensors"]
        given += ["weights=student.safetensors"] if config == "evaluate" else []
        if any(option in overrides for option in OWN):
            given += ["data.classes.names=[road,car]", "data.num_classes=2"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose(config, [*given, *overrides])

    return composed


def built(cfg, student):
    teacher = build_teacher(cfg)
    return build_criterion(cfg, student.channels, teacher.channels if teacher is not None else ()), teacher


def check_resolved(cfg, missing=()):
    """Every reference has its value, but for the channels, which come from the networks."""
    cfg = cfg.copy()
    for key, value in {"channels": {"student": [1] * 4, "teacher": [1] * 4}, "run_dir": "run"}.items():
        if key in cfg:
            cfg[key] = value
    assert OmegaConf.missing_keys(cfg) == set(missing)
    return OmegaConf.to_container(cfg, resolve=True)


def test_the_tree_is_walked():
    assert {"train", "evaluate", "predict"} <= set(ROOTS)
    groups = {group for group, _ in OPTIONS}
    assert {"data", "student", "teacher", "term", "distill", "optim", "trainer", "callbacks", "logger"} <= groups
    assert {"acdc", "camvid", "demo"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("root", ROOTS)
def test_a_command_asks_for_no_more_than_the_user_alone_can_know(root):
    asked = {
        "train": [],
        "check": [],
        "evaluate": ["weights"],
        "predict": ["weights", "input"],
        "export": ["weights", "format", "output"],
    }
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(root)
    check_resolved(cfg, missing=asked[root])


@pytest.mark.parametrize(("group", "option"), [o for o in OPTIONS if o[0] != "experiment"], ids=lambda value: value)
def test_every_option_is_an_override(composed, group, option):
    defaults = {key for entry in OmegaConf.load(CONF / "train.yaml").defaults if entry != "_self_" for key in entry}
    chosen = f"[{option}]" if group == "term" else option
    cfg = composed(f"{group}={chosen}" if group in defaults else f"+{group}={chosen}")
    asked = OPEN_ENDED.get(option) if group in ("student", "teacher") else None
    if asked is not None:
        assert OmegaConf.is_missing(cfg[group].network, asked)
        cfg[group].network[asked] = option
    resolved = check_resolved(cfg)
    if group == "term":
        header = (CONF / group / f"{option}.yaml").read_text().splitlines()[0]
        assert header.rsplit(".", 1)[1] in resolved["criterion"]["terms"]
    elif group in ("student", "teacher"):
        assert resolved[group]["network"].get("name", option) == option


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "distill"])
def test_a_set_of_terms_is_built(composed, option):
    with torch.device("meta"):
        cfg = composed(f"distill={option}")
        criterion, teacher = built(cfg, instantiate(cfg.student.network))
    assert isinstance(criterion, Criterion)
    assert (set(criterion.terms) != {"task"}) == (option not in ("none", "solve"))
    assert (teacher is not None) == (option != "none")


def test_a_preset_can_weigh_the_task(composed):
    terms = composed("distill=pixel_distillation").criterion.terms
    assert {name: entry.weight for name, entry in terms.items()} == {"task": 0.1, "kd": 0.9, "isrd": 10.0}


def test_a_preset_can_say_how_the_student_starts(composed):
    student = composed("distill=wecolora").student
    assert student.from_teacher
    assert student.lora == {"rank": 128, "train": ["head"], "keep_drop_path": False}


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "logger"])
def test_loggers_are_built(composed, option, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    loggers = [instantiate(logger) for logger in composed(f"logger={option}").logger.values()]
    assert all(isinstance(logger, Logger) for logger in loggers)
    assert any("csv" in type(logger).__name__.lower() for logger in loggers)  # metrics.csv is always there


@pytest.mark.parametrize("config", ["train", "evaluate"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_resolves(composed, experiment, config):
    resolved = check_resolved(composed(f"+experiment={experiment}", config=config))
    assert resolved["name"] == experiment


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_is_built(composed, experiment):
    cfg = composed(f"+experiment={experiment}", "student.weights=null", "trainer.accelerator=cpu", "trainer.devices=1")
    data = instantiate(cfg.data)
    assert isinstance(data, SegmentationDataModule)
    with torch.device("meta"):  # sizes without numbers: a B2 costs nothing
        student = instantiate(cfg.student.network)
        criterion, teacher = built(cfg, student)
    for network in (student, teacher):
        if network is not None:
            assert network.num_classes == data.num_classes == len(data.classes.names)
    assert criterion.weights["task"] > 0 or criterion.weights["pdd"] > 0  # which reads the labels itself
    assert (teacher is not None) == (not experiment.endswith("_teacher"))
    weights = criterion.terms["task"].class_weights
    assert weights is None or len(weights) == data.num_classes

    optimizer = instantiate(cfg.optim.optimizer)([*student.parameters(), *criterion.parameters()])
    schedule = instantiate(cfg.optim.scheduler)(optimizer, total=cfg.optim.horizon or 1000)
    assert cfg.optim.interval in ("step", "epoch")
    assert 0 < schedule.get_last_lr()[0] <= cfg.optim.optimizer.lr

    trainer = build_trainer(cfg)
    assert trainer.max_epochs == cfg.trainer.max_epochs > 0
    assert all(isinstance(callback, Callback) for callback in trainer.callbacks)
    assert len(trainer.loggers) == len(cfg.logger)
    checkpoint = trainer.checkpoint_callbacks
    assert any(callback.monitor == f"val/{cfg.protocol}/mIoU" for callback in checkpoint)
    assert any(callback.save_last or callback.filename == "last" for callback in checkpoint)  # for ckpt_path=last


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiments_transforms_make_batches(composed, experiment):
    """A frame of 2:1 through the configured transforms: bytes of one size, label beside image, no new ids."""
    data = instantiate(composed(f"+experiment={experiment}").data)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (128, 256, 3), dtype=np.uint8)
    label = rng.integers(0, data.num_classes, (128, 256), dtype=np.uint8)
    for transform in (data.train_transform, data.eval_transform):
        shapes = set()
        for seed in range(2 if transform is not None else 0):
            transform.set_random_seed(seed)
            moved = transform(image=image, mask=label)
            assert moved["image"].dtype == moved["mask"].dtype == np.uint8
            assert moved["image"].shape == (*moved["mask"].shape, 3)
            assert set(np.unique(moved["mask"])) <= {*range(data.num_classes), 255}
            assert min(moved["mask"].shape) >= 32  # MiT's largest stride
            shapes.add(moved["mask"].shape)
        assert len(shapes) <= 1


def header(path):
    """The comment at the top, with continued lines joined."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return re.sub(r"\\\n", " ", "\n".join(lines))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiments_header_shows_a_command_that_works(tmp_path, experiment):
    """As it stands there: it asks for all that the experiment needs, and for nothing unknown."""
    commands = re.findall(r"^python -m transkd\.train (.+)$", header(CONF / "experiment" / f"{experiment}.yaml"), re.M)
    assert commands
    overrides = shlex.split(commands[0].replace("<run>", "run"))
    assert overrides[0] == f"+experiment={experiment}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*overrides, f"run_dir={tmp_path}"])
    check_resolved(cfg)
    needs_a_teacher = len(cfg.criterion.terms) > 1
    assert not needs_a_teacher or cfg.teacher.weights is not None or cfg.teacher.fit.max_epochs > 0


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.relative_to(CONF).as_posix())
def test_every_file_begins_with_what_it_is(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")
    assert len(lines[0]) > 20

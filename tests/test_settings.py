"""Every setting of ours has a type and a range; a mistake is one line that says what is allowed."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from transkd.cli import CONF
from transkd.errors import UserError
from transkd.settings import EvaluateSettings, ExportSettings, PredictSettings, TrainSettings


def read(settings, config, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return settings.read(compose(config, overrides))


def train(*overrides):
    return read(TrainSettings, "train", "+experiment=demo", "distill=transkd_cwd", "run_dir=run", *overrides)


def test_values_are_typed():
    settings = train("data.batch_size=4", "student.lora.rank=8", "teacher.min_miou=0", "ckpt_path=7")
    assert settings.data.batch_size == 4
    assert settings.student.lora.rank == 8
    assert settings.teacher.min_miou == 0.0
    assert settings.ckpt_path == "7"  # a number typed for a path is its text
    assert settings.criterion.terms["cwd"].weight == 3.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pictures=-1", "pictures=-1: expected a whole number of at least 0"),
        ("criterion.terms.csf.weight=nan", "criterion.terms.csf.weight=nan: expected a number of at least 0, or"),
        ("criterion.terms.csf.weight=-1", "criterion.terms.csf.weight=-1: expected a number of at least 0, or"),
        ("criterion.terms.csf.weight=true", "criterion.terms.csf.weight=true: expected a number of at least 0, or"),
        ("data.batch_size=2.5", "data.batch_size=2.5: expected a whole number of at least 1"),
        ("data.batch_size=null", "data.batch_size=null: expected a whole number of at least 1"),
        ("data.augment=gpu", "data.augment=gpu: expected cpu or device or auto"),
        ("+data.void=[300]", "data.void.0=300: expected a whole number from 0 to 255"),
        ("student.checkpointing=off", "student.checkpointing=off: expected true or false"),
        ("student.lora.rank=0", "student.lora.rank=0: expected a whole number of at least 1 or null"),
        ("student.lora.train=head", r"student.lora.train=head: expected a list \[a,b\] of text"),
        ("student.lora=null", "student.lora=null: expected a group of settings"),
        ("teacher.min_miou=2", "teacher.min_miou=2: expected a number from 0 to 1"),
        ("teacher.fit.max_epochs=1.5", "teacher.fit.max_epochs=1.5: expected a whole number of at least 0"),
        ("optim.interval=week", "optim.interval=week: expected step or epoch"),
        ("channels_last=maybe", "channels_last=maybe: expected true or false or auto"),
        ("seed=-1", "seed=-1: expected a whole number of at least 0"),
        (
            "trainer.accumulate_grad_batches=0",
            "accumulate_grad_batches=0: expected a whole number of at least 1",
        ),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1: expected a number of at least 0 or null"),
        (
            "trainer.limit_train_batches=0",
            "limit_train_batches=0: expected a whole number of at least 1 or a number above 0 to 1 or",
        ),
        (
            "trainer.limit_val_batches=-1",
            "limit_val_batches=-1: expected a whole number of at least 0 or a number from 0 to 1",
        ),
        ("+trainer.overfit_batches=-0.5", "overfit_batches=-0.5: expected"),
        ("+trainer.max_steps=-2", "trainer.max_steps=-2: expected a whole number of at least -1"),
        ("+trainer.gradient_clip_algorithm=l2", "gradient_clip_algorithm=l2: expected norm or value or null"),
        ("trainer.num_sanity_val_steps=-3", "num_sanity_val_steps=-3: expected a whole number of at least -1"),
        ("optim.optimizer.lr=-0.1", "optim.optimizer.lr=-0.1: expected a number of at least 0"),
        ("+optim.optimizer.eps=0", "optim.optimizer.eps=0: expected a number above 0"),
        ("optim.optimizer.weight_decay=-1", "weight_decay=-1: expected a number of at least 0"),
        ("optim.optimizer.betas=[0.9,1]", "optim.optimizer.betas.1=1: expected a number from 0 to below 1"),
        ("optim.optimizer.lr=inf", "optim.optimizer.lr=inf: expected a number of at least 0"),
        ("optim.scheduler.warmup=-1", "optim.scheduler.warmup=-1: expected a whole number of at least 0"),
        ("optim.scheduler.power=-1", "optim.scheduler.power=-1: expected a number of at least 0"),
        ("optim.horizon=0", "optim.horizon=0: expected a whole number of at least 1"),
        ("resume=yes", "resume=yes: expected strict or force"),
        ("license_policy=strict", "license_policy=strict: expected any or commercial"),
        ("~criterion.terms.task", "the term 'task'"),
    ],
)
def test_a_mistake_names_the_setting_and_what_is_allowed(override, message):
    with pytest.raises(UserError, match=message) as error:
        train(override)
    assert "\n" not in str(error.value)


def test_from_teacher_is_no_word_that_merely_counts_as_true():
    for word in ("no", "off", "abc", "1"):
        with pytest.raises(UserError, match=rf"student\.from_teacher={word}: expected true or false"):
            train(f"student.from_teacher={word}")


def test_what_is_not_given_is_asked_for():
    with pytest.raises(UserError, match=r"weights has no value; give it on the command line: weights=…"):
        read(EvaluateSettings, "evaluate", "run_dir=run")
    with pytest.raises(UserError, match=r"input has no value"):
        read(PredictSettings, "predict", "weights=a")


@pytest.mark.parametrize(
    ("settings", "config", "given", "override", "message"),
    [
        (PredictSettings, "predict", ["weights=a", "input=b"], "opacity=5", "opacity=5: expected a number from 0"),
        (PredictSettings, "predict", ["weights=a", "input=b"], "resize=no", "resize=no: expected true or false"),
        (
            ExportSettings,
            "export",
            ["weights=a", "format=onnx", "output=b"],
            "tolerance=inf",
            "tolerance=inf: ",
        ),
        (
            ExportSettings,
            "export",
            ["weights=a", "format=onnx", "output=b"],
            "output=null",
            "output=null: ",
        ),
    ],
)
def test_the_other_commands_check_as_well(settings, config, given, override, message):
    read(settings, config, *given)
    with pytest.raises(UserError, match=message):
        read(settings, config, *given, override)


def test_a_configuration_of_an_earlier_version_takes_defaults_for_what_it_lacks():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["+experiment=demo", "run_dir=run"])
    OmegaConf.set_struct(cfg, False)
    del cfg.student["checkpointing"], cfg["keep_freed_memory"]
    settings = TrainSettings.read(cfg)
    assert settings.student.checkpointing is False
    assert settings.keep_freed_memory is True

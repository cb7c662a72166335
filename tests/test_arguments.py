"""Values in a configuration against the annotations of the classes that they are passed to."""

import pytest
from hydra import compose, initialize_config_dir

from transkd.arguments import check_arguments
from transkd.cli import CONF
from transkd.errors import UserError

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
PRESETS = sorted(path.stem for path in (CONF / "distill").glob("*.yaml"))


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["run_dir=run", *overrides])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_passes(experiment):
    check_arguments(composed(f"+experiment={experiment}", "data.root=data"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes(preset):
    check_arguments(composed("+experiment=demo", f"distill={preset}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["criterion.terms.csf.term.mid_channels=2.5"], r"csf\.term\.mid_channels=2\.5: expected a whole number"),
        (["criterion.terms.csf.term.temperature=warm"], r"csf\.term\.temperature=warm: expected a number"),
        (
            ["criterion.terms.pea.term.stages=[1,two]"],
            r"pea\.term\.stages=.*: expected a list \[a,b\] of",
        ),
        (["criterion.terms.cwd.term.mask_ignored=yes"], r"cwd\.term\.mask_ignored=yes: expected true or false"),
        (["student.network.scale=half"], r"student\.network\.scale=half: expected a number"),
        (["data.prepare.train=many"], r"data\.prepare\.train=many: expected a whole number"),
        (["trainer.enable_model_summary=no"], r"trainer\.enable_model_summary=no: expected true or false or null"),
        (["+trainer.inference_mode=off"], r"trainer\.inference_mode=off: expected true or false"),
        (["+callbacks.last.save_top_k=1.5"], r"callbacks\.last\.save_top_k=1\.5: expected a whole number"),
        (["+optim.optimizer.amsgrad=abc"], r"optim\.optimizer\.amsgrad=abc: expected true or false"),
        (
            ["+optim.optimizer.weigth_decay=1"],
            r"weigth_decay: .*AdamW has no such argument; did you mean weight_decay\?",
        ),
        (["data.train_transform.transforms.1.p=1.5"], r"transforms\.1\.p=1\.5: expected a number from 0 to 1 \("),
        (["data.train_transform.transforms.1.p=-0.1"], r"transforms\.1\.p=-0\.1: expected a number from 0 to 1 \("),
        (["+data.train_transform.transforms.0.heigth=3"], r"RandomCrop has no such argument; did you mean height\?"),
        (["+data.find.condition=[fog]"], r"find_acdc has no such argument; did you mean conditions\?"),
        (
            ["data.classes={_target_:transkd.data.ClassSet,names:[a],colors:[[0,0,0]]}"],
            r"data\.classes\.colors: transkd\.data\.ClassSet has no such argument\. There are: names, palette",
        ),
        (["trainer.devices=[a]"], r"trainer\.devices=\['a'\]: expected a list \[a,b\] of a whole number or text"),
        (["optim.scheduler.warmup=1.5"], r"optim\.scheduler\.warmup=1\.5: expected a whole number"),
    ],
)
def test_a_value_of_another_type_is_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        check_arguments(composed("+experiment=demo", "distill=transkd_cwd", *overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["[0,1]", "2", "auto", "'0,1'"])
def test_devices_may_be_listed(value):
    check_arguments(composed("+experiment=demo", f"trainer.devices={value}"))

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
        (["optim.scheduler.warmup=1.5"], r"optim\.scheduler\.warmup=1\.5: expected a whole number"),
    ],
)
def test_a_value_of_another_type_is_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        check_arguments(composed("+experiment=demo", "distill=transkd_cwd", *overrides))
    assert "\n" not in str(error.value)

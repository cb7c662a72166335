import golden
import pytest
import torch

from transkd.errors import UserError
from transkd.losses import CSFLoss, EALoss, GLMixerLoss, PEALoss
from transkd.models.storage.transkd_checkpoint import split_transkd_checkpoint

CHANNELS = {"student_channels": (8, 16, 24, 32), "teacher_channels": (12, 20, 28, 40)}


def published(variant):
    """A whole checkpoint of "base", "gl" or "ea": the golden student and terms under the authors' names."""
    student = {f"student.{name}": value for name, value in golden.load("segformer_student", "param.").items()}
    embeddings = {"base": "pea", "gl": "gl_mixer", "ea": "ea"}[variant]
    return student | golden.load("csf_eval", "param.") | golden.load(embeddings, "param.")


@pytest.mark.parametrize(
    ("variant", "terms"),
    [
        ("base", {"csf": CSFLoss(**CHANNELS, mid_channels=16), "pea": PEALoss(**CHANNELS)}),
        (
            "gl",
            {
                "csf": CSFLoss(**CHANNELS, mid_channels=16),
                "pea": PEALoss(**CHANNELS, stages=(1, 2, 3)),
                "gl_mixer": GLMixerLoss(**CHANNELS, num_heads=4),
            },
        ),
        ("ea", {"csf": CSFLoss(**CHANNELS, mid_channels=16), "ea": EALoss(**CHANNELS)}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_each_variant_splits_into_loadable_parts(variant, terms, prefix):
    parts = split_transkd_checkpoint({prefix + name: value for name, value in published(variant).items()})
    assert set(parts) == {"student", *terms}
    for name, term in terms.items():
        term.load_state_dict(parts[name], strict=True)


def test_the_students_names():
    parts = split_transkd_checkpoint(published("base"))["student"]
    original = golden.load("segformer_student", "param.")
    assert parts.pop("head.linear_fuse.bn.num_batches_tracked") == 0
    head = ("linear_c", "linear_fuse", "linear_pred")
    expected = {("head." if name.startswith(head) else "encoder.") + name for name in original}
    assert set(parts) == expected
    for name, value in parts.items():
        assert torch.equal(value, original[name.split(".", 1)[1]])


def test_batch_counters_are_kept_where_they_exist():
    checkpoint = published("base")
    norms = [name.removesuffix("running_mean") for name in checkpoint if name.endswith("running_mean")]
    checkpoint |= {f"{norm}num_batches_tracked": torch.tensor(7) for norm in norms}
    parts = split_transkd_checkpoint(checkpoint)
    term = CSFLoss(**CHANNELS, mid_channels=16)
    term.load_state_dict(parts["csf"], strict=True)
    assert term.stages["1"].squeeze.norm.num_batches_tracked == 7
    assert parts["student"]["head.linear_fuse.bn.num_batches_tracked"] == 7


def test_batch_counters_are_filled_in():
    part = split_transkd_checkpoint(golden.load("csf_eval", "param."))["csf"]
    assert part["stages.4.reduce.norm.num_batches_tracked"] == 0


def test_the_deepest_stage_comes_first_in_the_reference():
    checkpoint = golden.load("csf_eval", "param.")
    part = split_transkd_checkpoint(checkpoint)["csf"]
    assert torch.equal(part["stages.4.expand.conv.weight"], checkpoint["skfs.0.conv2.0.weight"])
    assert torch.equal(part["stages.1.expand.conv.weight"], checkpoint["skfs.3.conv2.0.weight"])
    assert torch.equal(part["stages.1.student_branch.bias"], checkpoint["skfs.3.fcs.0.bias"])


def test_shares_are_joined_in_order():
    part = split_transkd_checkpoint(golden.load("ea", "param."))["ea"]
    torch.testing.assert_close(part["student_share"], torch.tensor([0.15, 0.25, 0.35, 0.45]))
    torch.testing.assert_close(part["assistant_share"], torch.tensor([0.55, 0.65, 0.75, 0.85]))


@pytest.mark.parametrize(
    "name",
    [
        "teacher.norm1.weight",
        "student.decode.weight",
        "block1.0.norm1.weight",
        "skfs.0.conv3.0.weight",
        "patch_embed1.proj.weight",  # without fuse_weights: a student's without its prefix
    ],
)
def test_a_tensor_that_belongs_nowhere_is_named(name):
    with pytest.raises(UserError, match=f"'{name}' is not a tensor of a TransKD checkpoint"):
        split_transkd_checkpoint(golden.load("pea", "param.") | {name: torch.zeros(1)})


def test_an_empty_checkpoint_has_no_parts():
    assert split_transkd_checkpoint({}) == {}

"""Every term against the reference's values and gradients, loaded as the authors' checkpoints are."""

import golden
import pytest
import torch
from drawn import STUDENT, TEACHER

from transkd.losses import CSFLoss, EALoss, GLMixerLoss, PEALoss
from transkd.models.storage.transkd_checkpoint import split_transkd_checkpoint


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def filled(term, name, part):
    """The term in float64 with the golden parameters."""
    term = term(student_channels=STUDENT, teacher_channels=TEACHER).double()
    term.load_state_dict(split_transkd_checkpoint(golden.load(name, "param."))[part], strict=True)
    return term


def check_gradients(name, prefix, kind, got):
    expected = golden.stages(name, f"{prefix}{kind}")
    assert len(expected) > 0
    for tensor, gradient in zip(got, expected, strict=False):
        close(tensor.grad, gradient, rtol=1e-8, atol=1e-13)
    assert all(tensor.grad is None for tensor in got[len(expected) :])


@pytest.mark.parametrize(
    ("criterion", "temperature", "key"),
    [
        ("hierarchical_context", 1.0, "hcl"),
        ("channel_kl", 1.0, "cwd_t1"),
        ("channel_kl", 4.0, "cwd_t4"),
        ("spatial_kl", 1.0, "spatial_kl_t1"),
    ],
)
def test_csf_in_training(criterion, temperature, key):
    def build(**channels):
        return CSFLoss(**channels, mid_channels=16, criterion=criterion, temperature=temperature)

    student, teacher = (golden.output("csf_train", who) for who in ("student", "teacher"))
    value = filled(build, "csf_train", "csf")(student, teacher)
    close(value, golden.load("csf_train", f"loss.{key}")[""])
    value.backward()
    if golden.stages("csf_train", f"grad.{key}."):
        check_gradients("csf_train", f"grad.{key}.", "feature", student.features)
    assert all(feature.grad is None for feature in teacher.features)


@pytest.mark.parametrize("training", [True, False])
def test_csf_fused_maps(training):
    name = "csf_train" if training else "csf_eval"
    term = filled(lambda **channels: CSFLoss(**channels, mid_channels=16), name, "csf").train(training)
    student, teacher = (golden.output(name, who) for who in ("student", "teacher"))
    for fused, expected in zip(term.fuse(student.features), golden.stages(name, "out.fused"), strict=True):
        close(fused, expected)
    if not training:  # in training a second pass would move no value, but the running statistics
        close(term(student, teacher), golden.load(name, "loss.hcl")[""])


def test_pea():
    student, teacher = (golden.output("pea", who) for who in ("student", "teacher"))
    term = filled(PEALoss, "pea", "pea")
    for stage, expected in enumerate(golden.stages("pea", "out.projected"), start=1):
        close(term.projections[str(stage)](student.embeddings[stage - 1]), expected)
    value = term(student, teacher)
    close(value, golden.load("pea", "loss.pea")[""])
    value.backward()
    check_gradients("pea", "grad.", "embedding", student.embeddings)


@pytest.mark.parametrize("residual", [False, True])
def test_gl(residual):
    name = "gl_mixer_residual" if residual else "gl_mixer"
    student, teacher = (golden.output(name, who) for who in ("student", "teacher"))
    mixer = filled(lambda **channels: GLMixerLoss(**channels, num_heads=4, residual=residual), name, "gl_mixer")
    shallow = filled(lambda **channels: PEALoss(**channels, stages=(1, 2, 3)), name, "pea")
    close(mixer.projection(mixer.mix(student.embeddings[3])), golden.stages(name, "out.projected")[3])
    value = mixer(student, teacher) + shallow(student, teacher)
    close(value, golden.load(name, "loss.gl_pea")[""])
    value.backward()
    check_gradients(name, "grad.", "embedding", student.embeddings)


def test_ea():
    student, teacher = (golden.output("ea", who) for who in ("student", "teacher"))
    term = filled(EALoss, "ea", "ea")
    for assisted, expected in zip(term.assist(student), golden.stages("ea", "out.projected"), strict=True):
        close(assisted, expected)
    value = term(student, teacher)
    close(value, golden.load("ea", "loss.ea_pea")[""])
    value.backward()
    check_gradients("ea", "grad.", "embedding", student.embeddings)
    check_gradients("ea", "grad.", "feature", student.features)

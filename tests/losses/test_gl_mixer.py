import numpy as np
import pytest
import torch
from drawn import STUDENT, TEACHER, make_pair, redrawn

from transkd.errors import UserError
from transkd.losses import GLMixerLoss

CHANNELS = {"student_channels": STUDENT, "teacher_channels": TEACHER}


def numpy_mix(term, tokens):
    """Attention and gated convolution of one image's tokens [N, C], head by head and window by window."""
    weights = {name: value.detach().numpy() for name, value in term.named_parameters()}
    count, channels = tokens.shape
    width = channels // term.num_heads
    query, key, value = np.split(tokens @ weights["qkv.weight"].T, 3, axis=1)
    heads = []
    for head in range(term.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = np.exp(query[:, part] @ key[:, part].T / np.sqrt(width))
        heads.append(scores / scores.sum(axis=1, keepdims=True) @ value[:, part])
    attended = np.concatenate(heads, axis=1) @ weights["proj.weight"].T + weights["proj.bias"]
    padded = np.pad(tokens, ((1, 1), (0, 0)))

    def convolve(name):
        kernel = weights[f"{name}.weight"]
        windows = [sum(kernel[:, :, k] @ padded[i + k] for k in range(3)) for i in range(count)]
        return np.stack(windows) + weights[f"{name}.bias"]

    gated = convolve("value") / (1 + np.exp(-convolve("gate")))
    return weights["alpha"] * attended + weights["beta"] * gated


@pytest.mark.parametrize("residual", [False, True])
def test_mixture_against_numpy(residual):
    term = redrawn(GLMixerLoss(**CHANNELS, stage=2, num_heads=4, residual=residual))
    tokens = torch.randn(1, 7, 16, dtype=torch.float64)
    expected = numpy_mix(term, tokens[0].numpy()) + residual * tokens[0].numpy()
    np.testing.assert_allclose(term.mix(tokens)[0].detach().numpy(), expected, rtol=1e-10)


def test_starts_from_equal_shares():
    term = GLMixerLoss(**CHANNELS)
    assert term.alpha.tolist() == term.beta.tolist() == [0.5]


@pytest.mark.parametrize("stage", [1, 4])
def test_reads_its_stage_alone(stage):
    student, teacher, _ = make_pair()
    GLMixerLoss(**CHANNELS, stage=stage)(student, teacher).backward()
    reached = [tokens.grad is not None for tokens in student.embeddings]
    assert reached == [index == stage for index in range(1, 5)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 3, "num_heads": 5}, "divide the student's 24 channels at stage 3; got 5"),
        ({"num_heads": 0}, "got 0"),
        ({"stage": 5}, "from 1 to 4; got 5"),
        ({"stage": 0}, "from 1 to 4; got 0"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(UserError, match=message):
        GLMixerLoss(**CHANNELS, **settings)

"""Layers of a CPU are chosen by measurement, once per machine."""

import json
import logging
import sys
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from transkd.layers.attention import attend, convolution_pays
from transkd.layers.choices import CHOICES, Choices
from transkd.training import cpu_choices
from transkd.training.cpu_choices import choose_layers


@pytest.fixture(autouse=True)
def choices(monkeypatch):
    for name, value in asdict(CHOICES).items():
        monkeypatch.setattr(CHOICES, name, value)


def clocked(monkeypatch, plain, convolved):
    """Measurements return given seconds; which computation is timed is known by its turn."""
    turns = iter([plain, convolved] * 1000)
    monkeypatch.setattr(cpu_choices, "_seconds", lambda run: next(turns))


@pytest.mark.parametrize(("plain", "convolved", "chosen"), [(2.0, 1.0, True), (1.0, 2.0, False), (1.04, 1.0, False)])
def test_the_faster_computation_is_chosen(plain, convolved, chosen, monkeypatch, tmp_path, caplog):
    clocked(monkeypatch, plain, convolved)
    with caplog.at_level(logging.INFO):
        choose_layers(tmp_path / "cache" / "choices.json")
    assert asdict(CHOICES) == {"linear": chosen, "linear_bf16": chosen, "attention": chosen}
    assert ("linear, linear_bf16, attention" if chosen else "none") in caplog.text


def test_a_machine_is_measured_once(monkeypatch, tmp_path, caplog):
    cache = tmp_path / "choices.json"
    cache.write_text(json.dumps({"another machine": asdict(Choices())}))
    clocked(monkeypatch, 1.0, 2.0)
    choose_layers(cache)
    assert len(json.loads(cache.read_text())) == 2
    monkeypatch.setattr(cpu_choices, "_seconds", lambda run: pytest.fail("measured again"))
    with caplog.at_level(logging.INFO):
        choose_layers(cache)
    assert asdict(CHOICES) == {"linear": False, "linear_bf16": False, "attention": False}
    assert str(cache) in caplog.text


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_cache_is_measured_anew(content, monkeypatch, tmp_path):
    cache = tmp_path / "choices.json"
    cache.write_text(content)
    clocked(monkeypatch, 1.0, 2.0)
    choose_layers(cache)
    assert len(json.loads(cache.read_text())) == 1


def test_without_a_place_for_the_cache(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    clocked(monkeypatch, 1.0, 2.0)
    with caplog.at_level(logging.INFO):
        choose_layers(tmp_path / "file" / "choices.json")
    assert not CHOICES.linear
    assert "measured again at the next start" in caplog.text


def test_what_is_measured_are_equal_computations():
    for plain, convolved in (cpu_choices._linear(torch.float32), cpu_choices._attention()):
        for ours, theirs in zip(convolved(), plain(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_layer_follows_the_choice(monkeypatch):
    seen = []
    layers = sys.modules["transkd.layers.token_linear"]  # the package exports the function of this name
    monkeypatch.setattr(layers, "convolved_row", lambda x, *others: seen.append(x.dtype) or F.linear(x, *others))
    x, weight = torch.randn(3, 4), torch.randn(5, 4)

    def all_types():
        layers.token_linear(x, weight), layers.token_linear(x.bfloat16(), weight.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            layers.token_linear(x, weight)

    CHOICES.linear, CHOICES.linear_bf16 = False, True
    all_types()
    assert seen == [torch.bfloat16, torch.float32]  # the second under autocast
    CHOICES.linear, CHOICES.linear_bf16 = True, False
    all_types()
    assert seen[2:] == [torch.float32]


def test_attention_follows_the_choice():
    query, pair = torch.randn(1, 8192, 32), torch.randn(1, 128, 64)
    with torch.no_grad():
        assert convolution_pays(query, pair, 1)
        convolved = attend(query, pair, 1)
        CHOICES.attention = False
        assert not convolution_pays(query, pair, 1)
        torch.testing.assert_close(attend(query, pair, 1), convolved, rtol=1e-4, atol=1e-5)

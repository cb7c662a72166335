"""The other ways to compute a step compute the same, and one that does not is refused; nothing here is timed."""

import json
import math
from argparse import Namespace

import benchmark
import pytest
import torch
import torch.nn.functional as F
from benchmark_runs import KEYS, one_line_error
from benchmarks import forward, measure, step, training

from transkd.errors import UserError
from transkd.layers import attention

pytestmark = pytest.mark.usefixtures("few_operations")

CPU = torch.device("cpu")
NETWORKS = ("--teacher", "segformer_b0", "--student", "segformer_b0")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """No profiler, and networks of one narrow block a stage."""
    monkeypatch.setattr(measure, "operator_shares", lambda run, device: {"mm": 0.75, "add": 0.25})
    sizes = {"channels": [8, 16, 40, 64], "depths": [1, 1, 1, 1]}
    small = [f"+{who}.network.encoder.{key}={sizes[key]}" for who in ("student", "teacher") for key in sizes]
    compose = training.compose_config

    def compose_small(args, distill, *overrides):
        return compose(args, distill, *overrides, *([] if args.student == "pvt_v2_b0" else small))

    for module in (training, step):
        monkeypatch.setattr(module, "compose_config", compose_small)


def parts(distill="transkd_base"):
    args = Namespace(student="segformer_b0", teacher="segformer_b0")
    return training.build_parts(training.compose_config(args, distill, "data.num_classes=5"), CPU)


def run(*arguments):
    size = () if "--sizes" in arguments else ("--size", "32", "64")
    benchmark.main(["step", *NETWORKS, *size, "--rounds", "1", "--threads", "1", *map(str, arguments)])


@pytest.mark.parametrize("distill", ["transkd_base", "kd"])
def test_every_choice_gives_the_same_loss_and_gradients(distill):
    built = parts(distill)
    image, target = training.draw_batch((45, 77), 2, 5, CPU)
    steps = training.build_steps(built, list(training.AGAINST), False, torch.float32)
    found = {}
    for name, one in steps.items():
        with one.repeatable(torch.float64):
            found[name] = one.gradients(image.double() / 255, target)
    assert all(p.dtype == torch.float32 and p.grad is None for p in built.trained())
    for name in training.AGAINST:
        for ours, other in zip(found["ours"], found[name], strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-7, atol=1e-10)
    differences = training.compare(steps, image, target)
    assert differences["ours"] == (0, 0)
    assert max(difference.gradient for difference in differences.values()) < 1e-9


def test_backward_goes_through_the_teacher_of_the_naive_step_alone():
    built = parts()
    image, target = training.draw_batch((32, 64), 2, 5, CPU)
    naive = training.Step(built, ["teacher-graph"])
    naive.backward(naive.loss(image, target))
    assert naive.teacher.encoder.patch_embed1.proj.weight.grad is not None
    ours = training.Step(built)
    ours.backward(ours.loss(image, target))
    assert all(p.grad is None for p in built.teacher.parameters())


def test_explicit_attention_is_attention_and_is_put_back():
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 4, 4))
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(forward.explicit_attention(query, key, value), expected)
    patched = (F, "scaled_dot_product_attention"), (attention, "convolution_pays"), (torch.Tensor, "detach")
    originals = [getattr(*each) for each in patched]
    training.Step(parts(), training.CHOICES)(*training.draw_batch((32, 32), 2, 5, CPU))
    assert [getattr(*each) for each in patched] == originals


def test_explicit_attention_is_not_ours_by_another_way(monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 1)
    monkeypatch.setattr(attention, "_convolved", lambda *image: pytest.fail("by convolutions"))
    batch = training.draw_batch((32, 32), 2, 5, CPU)
    training.Step(parts(), ["explicit-attention"])(*batch)
    with pytest.raises(pytest.fail.Exception):
        training.Step(parts())(*batch)


def test_a_wrong_alternative_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(forward, "explicit_attention", lambda query, key, value: 0 * query)
    assert "explicit-attention does not compute the same step" in one_line_error(run, "--against", "explicit-attention")
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="nothing was timed"):
        training.check_difference("x", training.Difference(math.nan, 0.0))


def test_report_and_json(tmp_path, capsys):
    file = tmp_path / "step.json"
    run("--against", "drawn-out", "--profile", "--optimizer", "--dtype", "bf16", "--json", file)
    report = capsys.readouterr().out
    assert "2×3×32×64, cross-entropy at labels, AdamW, bf16, 1 rounds" in report
    assert "| part of ours" in report
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found) == KEYS | {"operators", "parts"}
    assert set(found["parts"]) == {
        *("student forward", "teacher forward", "term task", "term csf", "term pea"),
        *("backward", "optimizer and zeroing", "rest"),
    }
    assert sum(found["parts"].values()) == pytest.approx(1)
    for row in found["rows"]:
        assert set(row) == {*measure.Cost._fields, "loss_difference", "gradient_difference"}
    ours, drawn_out = found["rows"]
    assert (ours["ratio"], ours["name"], drawn_out["name"]) == (1, "ours", "drawn-out")
    assert ours["gflop"] < drawn_out["gflop"]


def test_several_presets_and_compiled(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    run("--distill", "none", "kd", "--compile")
    lines = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    assert lines[2:] == ["none: ours", "none: ours, compiled", "kd: ours", "kd: ours, compiled"]


def test_sweep(tmp_path, capsys):
    file = tmp_path / "sweep.json"
    run("--distill", "none", "--sizes", "32x32", "32x64", "--json", file)
    assert "time ~ pixels^" in capsys.readouterr().out
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [(row["name"], row["pixels"]) for row in found["rows"]] == [("2×3×32×32", 2048), ("2×3×32×64", 4096)]


def test_exponent_by_hand():
    assert step.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert math.isnan(step.exponent([2], [3]))


def test_mistakes_are_one_line():
    assert "unknown distill distill/nothing" in one_line_error(run, "--distill", "nothing")
    assert "there is no teacher" in one_line_error(run, "--distill", "none", "--against", "teacher-graph")
    assert "no SegFormer head" in one_line_error(run, "--student", "pvt_v2_b0", "--against", "unfolded")
    assert "measure only ours" in one_line_error(run, "--batches", "1", "2", "--against", "unfolded")
    assert "--rounds" in one_line_error(run, "--rounds", "0")
    with pytest.raises(SystemExit):
        run("--sizes", "512")

"""What the benchmark compares is the same network, and its report says what it promises; nothing here is timed."""

import json
import sys

import benchmark
import pytest
import torch
from benchmark_runs import KEYS, one_line_error
from benchmarks import forward, measure
from torch import nn

from transkd.errors import UserError

pytestmark = pytest.mark.usefixtures("few_operations")

SIZE = (64, 96)


def run(*arguments):
    """One measurement at a tiny size, on one thread as the other tests."""
    benchmark.main(["forward", "--size", *map(str, SIZE), "--rounds", "1", "--threads", "1", *map(str, arguments)])


@torch.no_grad()
def test_drawn_out_is_ours():
    network = forward.build_network("segformer_b0", 5).double()
    ours, fused = forward.build_ours(network)
    others = [fused, *forward.build_unfolded(network), *forward.build_drawn_out(network)]
    image = torch.randn(2, 3, 45, 77, dtype=torch.float64)
    expected = ours.logits(image)
    assert expected.abs().max() > 0.1
    for other in others:
        torch.testing.assert_close(other.logits(image), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("against", "module", "names"),
    [
        ("transformers", "transformers", ["transformers"]),
        ("smp", "segmentation_models_pytorch", ["smp", "smp, stride 4"]),
    ],
)
@torch.no_grad()
def test_others_hold_the_same_network(against, module, names):
    pytest.importorskip(module)
    alternatives = forward.build_alternatives(forward.build_network("segformer_b0", 5), [against])
    distances = forward.compare_logits(alternatives, torch.randn(1, 3, *SIZE))
    assert list(distances) == ["ours", "fused", *names]
    assert distances["ours"] == 0
    assert max(distances.values()) < 1e-4
    # at the same stride the same layers have as many numbers
    assert (
        len({sum(p.numel() for p in found.module.parameters()) for found in alternatives if found.name != "fused"}) == 1
    )


@torch.no_grad()
def test_another_network_is_not_timed():
    network, other = (forward.build_network("segformer_b0", 5) for _ in range(2))
    alternatives = [*forward.build_ours(network), *forward.build_drawn_out(other)]
    with pytest.raises(UserError, match="drawn-out does not compute the same network"):
        forward.compare_logits(alternatives, torch.randn(1, 3, *SIZE))
    with torch.no_grad():
        other.head.linear_pred.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="its logits are nan"):
        forward.compare_logits(alternatives, torch.randn(1, 3, *SIZE))


def test_report_and_json(tmp_path, capsys):
    file = tmp_path / "forward.json"
    run("--against", "drawn-out", "--classes", 5, "--rounds", 2, "--json", file)
    report = capsys.readouterr().out
    assert "segformer_b0, 5 classes, 1×3×64×96, float32, 2 rounds" in report
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line[:1] == "|"]
    assert [row[0] for row in table] == ["forward", "-" * 9, "ours", "fused", "drawn-out"]
    assert table[3][3] == "1.00"

    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found) == KEYS
    assert found["command"].startswith("python scripts/benchmark.py forward --size 64 96")
    assert found["settings"]["classes"] == 5
    assert {"processor", "cores", "threads", "device", "load", "python", "versions"} == set(found["machine"])
    for row in found["rows"]:
        assert set(row) == {*measure.Cost._fields, "parameters", "difference"}
        assert len(row["seconds"]) == 2
        assert row["minimum"] <= row["median"] <= row["maximum"]
        assert row["gflop_per_s"] == pytest.approx(row["gflop"] / row["median"])
    ours, fused, drawn_out = found["rows"]
    assert fused["ratio"] == 1
    assert drawn_out["ratio"] == pytest.approx(drawn_out["median"] / fused["median"])
    assert ours["parameters"] == drawn_out["parameters"]
    assert fused["gflop"] < ours["gflop"] < drawn_out["gflop"]


def test_bf16_and_profile(tmp_path, capsys):
    file = tmp_path / "forward.json"
    run("--dtype", "bf16", "--profile", "--json", file)
    shares = json.loads(file.read_text(encoding="utf-8"))["operators"]
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert any("depth-wise" in name for name in shares)
    assert "operator of fused" in capsys.readouterr().out


def test_a_network_without_a_fused_form_is_compared_with_itself(capsys):
    run("--network", "resnet18")  # SegFormer's head
    assert "| fused" in capsys.readouterr().out
    run("--network", "pvt_v2_b0")  # semantic FPN
    report = capsys.readouterr().out
    assert "| ours " in report
    assert "| fused" not in report


@pytest.mark.parametrize(
    ("against", "module"), [("transformers", "transformers"), ("smp", "segmentation_models_pytorch")]
)
def test_a_missing_library_is_one_line(against, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"--against {against} needs the package {module}" in one_line_error(run, "--against", against)


def test_other_mistakes_are_one_line(monkeypatch):
    assert "unknown network 'segformer_b9'" in one_line_error(run, "--network", "segformer_b9")
    assert "pvt_v2_b0 has no SegFormer head" in one_line_error(run, "--network", "pvt_v2_b0", "--against", "drawn-out")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in one_line_error(run, "--device", "cuda")


def test_libraries_have_segformers_alone():
    pytest.importorskip("transformers")
    assert "has no pvt_v2_b0" in one_line_error(run, "--network", "pvt_v2_b0", "--against", "transformers")


@pytest.mark.parametrize(("settled", "expected"), [(True, "ab aabb aabb"), (False, "ab ab ab")])
def test_turns(settled, expected):
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = measure.take_turns(runs, rounds=2, warmup=1, settled=settled)
    assert "".join(order) == expected.replace(" ", "")
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_disturbed_rounds_are_repeated(monkeypatch):
    # three rounds, others taking 2, 0 and 0 seconds meanwhile: the first does not count
    taken = iter([0, 2, 2, 2, 2, 2])
    monkeypatch.setattr(measure, "others_seconds", lambda: next(taken))
    waits = []
    monkeypatch.setattr(measure, "wait_for_calm", lambda: waits.append(None))
    order = []
    seconds = measure.take_turns({"a": lambda: order.append("a")}, rounds=2, calm=True, warmup=0, settled=False)
    assert (len(seconds["a"]), len(order), len(waits)) == (2, 3, 3)


def test_calm_is_waited_for(monkeypatch):
    if not measure.STAT.exists():
        pytest.skip("this system does not tell")
    taken = iter([0, 1, 1, 1.05])  # a second of others' time in the first second, next to none in the second
    monkeypatch.setattr(measure, "others_seconds", lambda: next(taken))
    slept = []
    monkeypatch.setattr(measure.time, "sleep", slept.append)
    measure.wait_for_calm()
    assert slept == [1, 1]


def test_own_time_is_nobody_elses():
    if not measure.STAT.exists():
        pytest.skip("this system does not tell")
    assert measure.others_seconds() > 0


def test_calm_needs_linux(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "STAT", tmp_path / "stat")
    assert "--calm reads" in one_line_error(run, "--calm")


def test_gflop_by_hand():
    linear, image = nn.Linear(30, 50), torch.randn(7, 30)
    assert measure.count_gflop(lambda: linear(image)) == 2 * 7 * 30 * 50 / 1e9


def test_gflop_of_a_step_by_hand():
    grouped = nn.Conv2d(6, 6, 3, padding=1, groups=6)  # 9 multiply-adds a channel and position, three times
    image = torch.randn(2, 6, 5, 7, requires_grad=True)
    assert measure.count_gflop(lambda: grouped(image).sum().backward()) == 3 * 2 * 9 * 6 * 2 * 5 * 7 / 1e9


def test_table_is_markdown_in_columns():
    assert measure.as_markdown(("a", "long"), [("bcd", "1")]).splitlines() == [
        "| a   | long |",
        "| --- | ---: |",
        "| bcd |    1 |",
    ]

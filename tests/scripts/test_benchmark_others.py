"""The subcommands terms, score and loader: what they compare is the same, and their reports; nothing here is timed."""

import json

import benchmark
import pytest
import torch
from benchmark_runs import KEYS, one_line_error
from benchmarks import measure, score, terms
from torch import nn

pytestmark = pytest.mark.usefixtures("few_operations")


def run(tmp_path, *arguments):
    """The JSON of one measurement."""
    file = tmp_path / "found.json"
    benchmark.main([*map(str, arguments), "--rounds", "1", "--threads", "1", "--json", str(file)])
    return json.loads(file.read_text(encoding="utf-8"))


def test_terms(tmp_path, capsys):
    names = ("csf", "kd", "wecolora")
    found = run(tmp_path, "terms", "--size", 64, 96, "--batch", 2, "--classes", 5, "--names", *names)
    assert set(found) == KEYS
    assert [row["name"] for row in found["rows"]] == ["task", *names]
    assert all(set(row) == {*measure.Cost._fields, "memory_ratio"} for row in found["rows"])
    assert found["rows"][0]["ratio"] == found["rows"][0]["memory_ratio"] == 1
    assert "memory ratio" in capsys.readouterr().out


def test_peak_memory_is_that_of_the_largest_moment():
    class Doubling(nn.Module):
        def forward(self, student, teacher, target=None):
            return (2 * student.logits).sum()  # its product is one more copy of the logits

    pair = terms.draw_pair((8, 8, 8, 8), (8, 8, 8, 8), (64, 64))
    learning = terms.learning(Doubling(), pair)
    learning()
    peak = 1e6 * measure.peak_allocated_mb(learning, torch.device("cpu"))
    logits = pair[0].logits.numel() * torch.finfo(torch.float32).bits // 8
    assert logits <= peak <= 3 * logits
    assert pair[0].logits.grad is None


def test_score(tmp_path, capsys):
    found = run(tmp_path, "score", "--size", 46, 78, "--classes", 5, "--batch", 2, "--dtype", "bf16")
    assert set(found) == KEYS | {"differences"}
    whats = ("cross-entropy", "focal", "dice", "ohem", "scoring")
    names = [f"{what}, {way}" for what in whats for way in ("ours", "plain")]
    assert [row["name"] for row in found["rows"]] == names
    assert [found["rows"][i]["ratio"] for i in (0, 8)] == [1, 1]
    assert "0 pixels apart" in capsys.readouterr().out


def test_score_compares_the_same_in_float64():
    logits = torch.randn(2, 5, 12, 20, dtype=torch.float64)
    target = torch.randint(0, 5, (2, 46, 78)).masked_fill(torch.rand(2, 46, 78) < 0.1, 255)
    for term, formula in score.LOSSES.values():
        ours, plain = score.ours(term())(logits, target), score.plain(formula)(logits, target)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(score.our_confusion(logits, target), score.plain_confusion(logits, target))
    assert score.our_confusion(logits, target).sum() == (target != 255).sum()


def test_what_scores_otherwise_is_refused(tmp_path, monkeypatch):
    right = score.plain_confusion
    monkeypatch.setattr(score, "plain_confusion", lambda logits, target: right(logits, target).T + 1)
    assert "confusion matrices differ" in one_line_error(run, tmp_path, "score", "--size", 32, 32)
    monkeypatch.setitem(score.LOSSES, "focal", (score.TaskFocal, score.plain_cross_entropy))
    assert "focal: ours and plain differ" in one_line_error(run, tmp_path, "score", "--size", 32, 32)


LOADER = ("loader", "--teacher", "segformer_b0", "--distill", "kd", "--data", "synthetic", "--frame", 96, 192)


@pytest.mark.slow
def test_loader(tmp_path, capsys):
    found = run(tmp_path, *LOADER, "--images", 2, "--passes", 2, "--workers", 0, 1)
    assert set(found) == KEYS | {"images_per_core_s", "cores_needed"}
    rows = {row["name"]: row for row in found["rows"]}
    alone = ["loading alone, 0 workers", "loading alone, 1 workers"]
    assert list(rows) == ["in memory", "0 workers", "1 workers", *alone]
    assert rows["in memory"]["images_per_s"] == pytest.approx(4 / rows["in memory"]["median"])
    assert rows["1 workers"]["images_per_s_per_worker"] is None
    assert [rows[name]["gflop"] for name in alone] == [0, 0]
    assert found["cores_needed"] == pytest.approx(rows["in memory"]["images_per_s"] / found["images_per_core_s"])
    assert "cores for loading" in capsys.readouterr().out


def test_loader_mistakes_are_one_line(tmp_path):
    assert "no ACDC images" in one_line_error(run, tmp_path, *LOADER, "--root", tmp_path)
    assert "--workers" in one_line_error(run, tmp_path, *LOADER, "--workers", -1)
    assert "does not fill a batch" in one_line_error(run, tmp_path, *LOADER, "--images", 1)
    assert "unknown data" in one_line_error(run, tmp_path, *LOADER, "--data", "nothing")

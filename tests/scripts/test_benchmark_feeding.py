"""The subcommands train and inference: their rows, and what they refuse; nothing here is timed."""

import json
import sys
from importlib.util import find_spec

import benchmark
import pytest
import torch
from benchmark_runs import KEYS, one_line_error
from benchmarks import inference, measure

from transkd.errors import UserError

pytestmark = pytest.mark.usefixtures("few_operations")

LOOP = ("--teacher", "segformer_b0", "--size", 64, 96, "--frame", 96, 192, "--images", 2, "--steps", 2, "--warmup", 1)


def run(tmp_path, what, *arguments):
    """The JSON of one measurement."""
    file = tmp_path / "found.json"
    benchmark.main([what, *map(str, arguments), "--rounds", "1", "--threads", "1", "--json", str(file)])
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_train(tmp_path, capsys, monkeypatch):
    written, write = [], measure.write_json
    monkeypatch.setattr(
        measure, "write_json", lambda path, args, found: (written.append(len(found["rows"])), write(path, args, found))
    )
    found = run(tmp_path, "train", *LOOP, "--workers", 0)
    assert set(found) == KEYS
    assert [row["name"] for row in found["rows"]] == [
        "PNG, augmentation on the cpu",
        "PNG, augmentation on the device",
        "data.cache, augmentation on the cpu",
        "data.cache, augmentation on the device",
    ]
    for row in found["rows"]:
        assert row["share"] == pytest.approx(row["images_per_s"] / row["bare_images_per_s"])
    assert written == [1, 2, 3, 4, 4]  # as it goes
    report = capsys.readouterr().out
    assert "frames of 96×192 to 2×3×64×96, 0 workers" in report
    assert report.count("of the bare step's") == 4


def test_mistakes_are_one_line(tmp_path):
    assert "--images must be at least 2; got 1" in one_line_error(run, tmp_path, "train", *LOOP, "--images", 1)
    assert "--warmup must be at least 1" in one_line_error(run, tmp_path, "train", *LOOP, "--warmup", 0)
    assert "no ACDC images" in one_line_error(run, tmp_path, "train", *LOOP, "--root", tmp_path)
    assert "leave --dtype out" in one_line_error(run, tmp_path, "inference", "--dtype", "bf16")
    wrong = ("inference", "--network", "pvt_v2_b0", "--size", 64, 96)
    assert "has no SegFormer head" in one_line_error(run, tmp_path, *wrong)


def test_the_help_has_a_command_for_a_gpu(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["train", "--help"])
    assert "--device cuda --dtype bf16 --batch 8" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_exported_networks_are_the_same(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    runtimes = ["onnxruntime", *(["openvino"] if find_spec("openvino") else [])]
    against = ["transformers", *(runtime + suffix for runtime in runtimes for suffix in ("", "-int8"))]
    found = run(tmp_path, "inference", "--size", 64, 96, "--classes", 5, "--against", *against)
    assert set(found) == KEYS | {"runtimes"}
    assert [row["name"] for row in found["rows"]] == ["ours, fused", *against]
    for row in found["rows"]:
        if row["name"].endswith("-int8"):
            assert 1e-4 < row["difference"] < 0.3
        else:
            assert row["difference"] < 1e-4
            assert row["same_class"] > 0.999
    assert "onnxruntime" in capsys.readouterr().out


def test_another_network_is_not_timed():
    image = torch.rand(1, 3, 4, 4)
    ours = {"ours": lambda image: image}
    assert inference.compare({**ours, "runtime-int8": lambda image: image + 0.5}, image)["runtime-int8"][0] > 0.1
    with pytest.raises(UserError, match="runtime does not compute the same network"):
        inference.compare({**ours, "runtime": lambda image: image + 0.5}, image)
    with pytest.raises(UserError, match="nothing was timed"):
        inference.compare({**ours, "runtime-int8": lambda image: image * torch.nan}, image)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_missing_runtime_is_one_line(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"--against {name} needs the package {name}"):
        inference.OPEN[name](tmp_path / "none.onnx", (1, 3, 64, 96))

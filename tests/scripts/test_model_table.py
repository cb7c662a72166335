"""The page of the networks: its figures at a size where they can be checked, and that it is up to date."""

import model_table
import pytest
import torch
from benchmarks import forward, measure

from transkd.models import SEGMENTERS


def rows_of(page):
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_network_is_on_the_page():
    rows = rows_of(model_table.OUTPUT.read_text(encoding="utf-8"))
    missing = {*SEGMENTERS, *model_table.EXAMPLES} - {row[0] for row in rows}
    assert not missing, "run python scripts/model_table.py"


def test_rows_without_latency(tmp_path):
    page = tmp_path / "models.md"
    model_table.main(["--names", "segformer_b0", "resnet50", "--no-latency", "--output", str(page)])
    header, _, *rows = rows_of(page.read_text(encoding="utf-8"))
    assert header == ["network", "head", "parameters M", "GFLOP reference", "GFLOP", "strides", "embeddings"]
    # B0: 35.5 GFLOP reference and 18.4 folded were counted on the authors' implementation; 18.3 with BatchNorm folded
    assert rows == [
        ["segformer_b0", "segformer", "3.72", "35.5", "18.3", "4 8 16 32", "yes"],
        ["resnet50", "fpn", "28.48", "–", "176.1", "4 8 16 32", "–"],
    ]


def test_counted_on_meta_is_counted_for_real():
    size = (64, 96)
    counted = model_table.count("segformer_b0", size)
    network = forward.build_network("segformer_b0", model_table.CLASSES)
    image = torch.randn(1, 3, *size)
    with torch.inference_mode():
        alternatives = forward.build_alternatives(network, ["unfolded"])
        gflop = {name: measure.count_gflop(lambda logits=logits: logits(image)) for name, _, logits in alternatives}
    assert counted.gflop == gflop["fused"]
    assert counted.gflop_reference == gflop["unfolded"]
    assert counted.parameters == sum(parameter.numel() for parameter in network.parameters())


def test_deeplab_keeps_stride_16():
    counted = model_table.count("deeplabv3plus_resnet101", (64, 96))
    assert counted.strides == (4, 8, 16, 16)
    assert not counted.embeddings
    assert counted.gflop_reference is None


def test_latency_columns(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("segmentation_models_pytorch")
    page = tmp_path / "models.md"
    size = ["--size", "64", "96", "--rounds", "1"]
    model_table.main(["--names", "segformer_b0", "pvt_v2_b0", *size, "--output", str(page)])
    header, _, ours, other = rows_of(page.read_text(encoding="utf-8"))
    assert header[5:8] == ["seconds", "transformers", "smp"]
    assert all(cell.endswith("×") for cell in ours[6:8])
    assert other[6:8] == ["–", "–"]

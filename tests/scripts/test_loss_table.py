import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TERMS = sorted(path.stem for path in (ROOT / "conf" / "term").glob("*.yaml"))


@pytest.fixture
def loss_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import loss_table

    yield loss_table
    del sys.modules["loss_table"]


def test_the_page_is_up_to_date():
    """Its table, sections and pictures are those of the terms that there are; else run scripts/loss_table.py."""
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[`(\w+)`\]\(#", page, re.M) == TERMS
    assert re.findall(r"^### (\w+)$", page, re.M) == TERMS
    assert sorted(path.stem for path in (ROOT / "docs" / "losses").glob("*.svg")) == TERMS


@pytest.mark.parametrize(
    ("name", "student", "teacher", "labels"),
    [
        ("csf", "features 1-4", "features 1-4", False),
        ("pea_shallow", "embeddings 1, 2, 3", "embeddings 1, 2, 3", False),
        ("ea", "image; features 1, 2, 3; embeddings 1-4", "embeddings 1-4", False),
        ("dkd", "logits", "logits", True),
        ("isrd", "features 1", "image", False),
    ],
)
def test_what_a_term_reads(loss_table, name, student, teacher, labels):
    found = loss_table.reads(loss_table.build(ROOT / "conf" / "term" / f"{name}.yaml", (64, 96)))
    assert (loss_table.summarise(found[0]), loss_table.summarise(found[1]), found[2]) == (student, teacher, labels)


def test_the_presets_are_up_to_date(loss_table):
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert loss_table.presets() in page, "run python scripts/loss_table.py --no-cost"


def test_costs_survive_without_measuring(loss_table):
    costs = loss_table.known_costs(ROOT / "docs" / "losses.md")
    assert list(costs) == TERMS
    assert all(float(seconds) >= 0 and float(memory) >= 0 for seconds, memory in costs.values())

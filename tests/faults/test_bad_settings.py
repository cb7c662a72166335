"""Mistakes of every kind: each ends in one line and in time, none is taken silently. ``outcomes.txt`` holds the lines.

After a change of a message: ``TRANSKD_WRITE_OUTCOMES=1 pytest tests/faults/test_bad_settings.py -m slow``, and the file
shows in review what became of each.
"""

import os
import re
from itertools import islice
from pathlib import Path

import pytest
from bad_settings import bad_settings
from door import Door

OUTCOMES = Path(__file__).parent / "outcomes.txt"
SEED, MANY, FEW = 0, 300, 40
ARROW = " -> "


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    door = Door(tmp_path_factory.mktemp("door"))
    assert door.answer("seed=1") == "runs"
    return door


def outline(answer):
    """What of an answer is ours: no wording of a library, which its next version changes."""
    for words in ("does not accept this: ", "optim.optimizer: ", "optim.scheduler: ", "does not take the arguments "):
        before, found, after = answer.partition(words)
        if found:
            return f"{before}{found.strip()} {after.split(':')[0] if 'accept' in words else '…'}"
    return re.sub(r"(There are|there are|expected [\w-]+ or).*", r"\1 …", answer)[:140].strip()


def stored():
    lines = OUTCOMES.read_text(encoding="utf-8").splitlines()
    return dict(line.split(ARROW, 1) for line in lines)


@pytest.mark.parametrize("mistake", list(islice(bad_settings(SEED), FEW)))
def test_a_few(door, mistake):
    assert outline(door.answer(mistake)) == stored()[mistake]


@pytest.mark.slow
def test_many(door):
    answers = {mistake: door.answer(mistake) for mistake in islice(bad_settings(SEED), MANY)}
    assert [item for item in answers.items() if "\n" in item[1]] == []
    found = {mistake: outline(answer) for mistake, answer in answers.items()}
    if os.environ.get("TRANSKD_WRITE_OUTCOMES"):
        OUTCOMES.write_text("".join(f"{mistake}{ARROW}{said}\n" for mistake, said in found.items()), encoding="utf-8")
    assert found == stored()


def test_no_stored_outcome_is_a_traceback_or_silent():
    outcomes = stored()
    assert list(outcomes) == list(islice(bad_settings(SEED), MANY))
    assert [item for item in outcomes.items() if item[1].startswith(("runs", "FAULT", "TRACEBACK", "TOO SLOW"))] == []

"""The recipes of CONTRIBUTING.md as they stand, in a copy of the repository, pass the tests that they bring."""

import os
import shutil
import subprocess
import sys

import pytest
from documents import ROOT, blocks, text
from documents import files as files_of


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the additions; a block for a file that exists is a line to add to it."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("src", "conf", "tests", "scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for path, content in files_of(text("CONTRIBUTING")).items():
        with (root / path).open("a", encoding="utf-8") as file:
            file.write(content)
    return root


def run(root, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_block_is_a_file():
    page = text("CONTRIBUTING")
    assert len(files_of(page)) == len(blocks(page, "python")) + len(blocks(page, "yaml")) == 12


@pytest.mark.slow
def test_the_recipes_pass_their_tests_and_those_that_every_term_must_pass(copy):
    own = [path for path in files_of(text("CONTRIBUTING")) if path.startswith("tests/")]
    contract = "tests/losses/test_term_contract.py"
    shown = run(copy, "-m", "pytest", "-q", "-p", "no:xdist", "-rA", *own, contract, "-k", "entropy or pairs or plain")
    assert "passed" in shown
    for path in own:
        assert path in shown
    assert shown.count("test_term_contract.py") > 5


@pytest.mark.slow
def test_the_recipes_compose(copy):
    """The yaml of each is found by its name."""
    arguments = ["data=pairs", "data.root=data", "student=plain", "term=[entropy]", "distill=none"]
    shown = run(copy, "-m", "transkd.train", "--cfg", "job", *arguments)
    for target in ("find_pairs", "EntropyLoss", "name: plain"):
        assert target in shown


@pytest.mark.parametrize("tool", [("check",), ("format", "--check")], ids=" ".join)
def test_the_recipes_follow_the_style(copy, tool):
    new = [path for path in files_of(text("CONTRIBUTING")) if path.endswith(".py") and not (ROOT / path).exists()]
    run(copy, "-m", "ruff", *tool, *new)

"""Whose mistake an exception is, and what is said of it."""

import errno

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from transkd.cli import CONF
from transkd.command.explaining import explain


def composing(*overrides, folder=None):
    """Message about a configuration that cannot be composed."""
    where = [f"hydra.searchpath=[file://{folder}]"] if folder else []
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(Exception) as error:  # noqa: PT011
        compose("train", [*where, *overrides])
    message = explain(error.value, overrides)
    assert message is not None
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("student.weights=runs/lr=0.1/a.pth", """'student.weights="runs/lr=0.1/a.pth"'"""),
        ("student.weights=~/a.pth", """'student.weights="~/a.pth"'"""),
        ("student.weights=a(1).pth", """'student.weights="a(1).pth"'"""),
        ('student.weights=a"(', """'student.weights="a\\"("'"""),
        ("student.weights=it's(", """'student.weights="it'"'"'s("'"""),
    ],
)
def test_a_value_outside_the_grammar_comes_with_the_quotes_that_work(argument, quoted):
    assert composing(argument).endswith(f"write text in quotes of its own: {quoted}")
    import shlex

    (given,) = shlex.split(quoted)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("train", [given]).student.weights == argument.partition("=")[2]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"name: x\n\tseed: 3\n", ["mine.yaml, line 2, column 1", "not YAML"]),
        (b"name: [x\nseed: 3\n", ["mine.yaml, line 2", "expected ',' or ']'"]),
        (b"seed: 3\nseed: 4\n", ["mine.yaml, line 2", "duplicate key seed"]),
        ("name: é\n".encode("latin-1"), ["mine.yaml is not UTF-8 text"]),
        (b"defaults: nope\n", ["defaults must be a list"]),
    ],
)
def test_a_file_that_is_not_yaml_is_named_with_the_line(tmp_path, text, parts):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(text)
    message = composing("+experiment=mine", folder=tmp_path)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("group", ["data", "student", "teacher", "trainer", "optim", "callbacks", "logger"])
def test_a_group_as_null(group):
    message = composing(f"{group}=null")
    assert message.startswith(f"{group}=null: expected the name of one of the group's files")
    assert f"~{group}" in message


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), ["cannot write a/b: No space left", "free some"]),
        (OSError(errno.EROFS, "Read-only file system", "outputs"), ["no access to outputs", "hydra.run.dir=FOLDER"]),
        (PermissionError(errno.EACCES, "Permission denied", "w.pth"), ["no access to w.pth: Permission denied"]),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), ["a/b: Not a directory"]),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), ["out of memory", "data.batch_size"]),
        (MemoryError(), ["out of memory"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), ["data.num_workers"]),
        (MisconfigurationException("no\nbackend"), ["Lightning does not accept this: no backend"]),
    ],
)
def test_the_machine_and_lightning(error, parts):
    message = explain(RuntimeError("around it"))
    assert message is None
    try:
        raise RuntimeError("around it") from error
    except RuntimeError as outer:
        for found in (explain(error), explain(outer)):
            assert found is not None
            assert [part for part in parts if part not in found] == []


def test_a_process_of_the_run_that_was_killed():
    gloo = RuntimeError(
        "[third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [::1]:5: Connection reset by peer"
    )
    assert explain(gloo).startswith("another process of this run has ended without a word")


def test_a_function_that_does_not_take_what_the_configuration_gives(tmp_path, monkeypatch):
    (tmp_path / "own_listing.py").write_text("def find(root, split):\n    return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    find = instantiate({"_target_": "own_listing.find", "_partial_": True, "images": "all/*.jpg"})
    with pytest.raises(TypeError) as error:
        find(root="a", split="train")
    message = explain(error.value)
    assert message is not None
    assert message.startswith("a _target_ was called with other arguments than it takes: TypeError: find() got")
    assert "'images'" in message


def test_a_fault_of_ours_is_not_explained():
    assert explain(ZeroDivisionError("a bug")) is None

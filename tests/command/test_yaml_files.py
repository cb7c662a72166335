"""Aliases in YAML files of a user."""

import sys

import pytest

from transkd import train
from transkd.command.yaml_files import check_config_files, load_config
from transkd.errors import UserError

BOMB = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize("option", [["--config-dir={}"], ["--config-dir", "{}"], ["-cd", "{}"], ["-cp={}"]])
@pytest.mark.parametrize("text", [BOMB, "a: &a [1, *a]", "a: &a {b: *a}"])
def test_a_file_that_expands_without_end_is_named(tmp_path, option, text):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml: its aliases \(\*name\) expand to more than 100000 values"):
        check_config_files(["+experiment=mine", *(part.format(tmp_path) for part in option), "seed=1"])


@pytest.mark.parametrize(
    "text", ["a: &a {b: 1}\nc: [*a, *a]", "a: '&'\nb: '*'", "a: [&b", "a: *b # &", "[" * 3000 + "&a *a", ""]
)
def test_other_files_pass(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "binary.yaml").write_bytes(b"\xff&*")
    check_config_files(["--config-dir", str(tmp_path)])
    check_config_files(["--config-dir"])
    check_config_files(["--config-dir=nowhere", "-c", "job"])


def test_the_command_says_it_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(BOMB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["transkd", "--config-dir", str(tmp_path), "+experiment=demo"])
    with pytest.raises(SystemExit, match=r"^error: .*mine\.yaml: its aliases"):
        train.main()


def test_the_configuration_of_a_run(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a: &a {b: 1}\nc: [*a, *a]")
    assert load_config(file) == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}
    file.write_text(BOMB)
    with pytest.raises(UserError, match="aliases"):
        load_config(file)
    file.write_text("[1, 2]")
    with pytest.raises(UserError, match="expected settings by name"):
        load_config(file)

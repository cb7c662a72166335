"""The documentation is run: its Python, its commands as far as their configuration, its names and its links."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import transkd.losses
from transkd.metrics import PROTOCOLS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def table(heading):
    """First columns of the README's table that begins with this heading, without the code marks."""
    lines = README[README.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.replace("`", "").strip("|").split("|")] for line in lines]


def commands():
    lines = [line.split("  #")[0] for block in blocks(README, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m transkd.")]


def test_the_loop_of_your_own_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(README, "python")
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    assert names["loss"].isfinite()
    for part in (names["student"], names["csf"]):
        assert all(parameter.grad.isfinite().all() for parameter in part.parameters())
    assert all(parameter.grad is None for parameter in names["teacher"].network.parameters())
    bare = names["lraspp_mobilenet_v3_large"](weights=None, weights_backbone=None, num_classes=19)
    bare.load_state_dict(torch.load(tmp_path / "student.pth", weights_only=True), strict=True)


@pytest.mark.parametrize("command", commands(), ids=range(len(commands())))
def test_every_command_composes(command):
    module, *arguments = shlex.split(command)[2:]
    assert (ROOT / "src" / Path(*module.split("."))).with_suffix(".py").is_file()
    overrides = []
    for override in OverridesParser.create().parse_overrides([arg for arg in arguments if arg != "-m"]):
        line = override.input_line
        if override.is_sweep_override():
            assert "-m" in arguments
            line = f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        overrides.append(line)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(module.removeprefix("transkd."), overrides=overrides)
    if "channels" in config:  # filled in from the networks
        del config.channels
    assert "???" not in OmegaConf.to_yaml(config)


def test_terms():
    for name, class_name, *_ in table("term"):
        config = OmegaConf.load(ROOT / "conf" / "term" / f"{name}.yaml")
        assert config.term._target_ == f"transkd.losses.{class_name}"
        assert class_name in transkd.losses.__all__


def test_presets():
    for name, terms, _ in table("`distill=`"):
        config = OmegaConf.load(ROOT / "conf" / "distill" / f"{name}.yaml")
        assert list(config.defaults[0]["override /term"]) == [term for term in terms.split(", ") if term]


def test_protocols():
    assert [name for name, _ in table("`protocol=`")] == list(PROTOCOLS)


def test_swept_values_exist():
    swept = [line for line in commands() if "train -m " in line]
    assert swept
    for line in swept:
        for value in re.search(r"distill=(\S+)", line)[1].split(","):
            assert (ROOT / "conf" / "distill" / f"{value}.yaml").is_file()


def test_the_map_names_what_exists():
    (code_map,) = (block for block in blocks(README, "text") if "src/transkd/run.py" in block)
    for line in code_map.splitlines():
        assert (ROOT / line.split()[0]).exists(), line


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_links_lead_somewhere(text):
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).is_file(), target


def test_the_term_of_contributing(monkeypatch):
    source, test = blocks(CONTRIBUTING, "python")
    names = {}
    exec(source, names)
    monkeypatch.setattr(transkd.losses, "EntropyLoss", names["EntropyLoss"], raising=False)
    (config,) = blocks(CONTRIBUTING, "yaml")
    assert OmegaConf.create(config).term._target_ == "transkd.losses.EntropyLoss"
    exec(test, names)
    names["test_by_hand"]()

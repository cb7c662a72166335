"""The documentation is run: its Python, its commands as far as their configuration, its names and its links."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from documents import PAGES, ROOT, blocks, shell_lines, text, write_files
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from transkd.metrics import PROTOCOLS

COMMANDS = [
    pytest.param(page, line, id=f"{page}-{i}")
    for page in PAGES
    for i, line in enumerate(line for line in shell_lines(text(page)) if line.startswith("python -m transkd."))
]
SCRIPTS = [
    pytest.param(line, id=f"{page}-{i}")
    for page in PAGES
    for i, line in enumerate(line for line in shell_lines(text(page)) if line.startswith("python scripts/"))
]


def table(page, heading):
    """Rows of the table that begins with this heading, without the code marks."""
    lines = text(page)[text(page).index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.replace("`", "").strip("|").split("|")] for line in lines]


def test_the_readme_is_short():
    assert len(text("README").splitlines()) <= 150


def test_the_loop_of_your_own_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(text("README"), "python")
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    assert names["loss"].isfinite()
    for part in (names["student"], names["csf"]):
        assert all(parameter.grad.isfinite().all() for parameter in part.parameters())
    assert all(parameter.grad is None for parameter in names["teacher"].network.parameters())
    bare = names["lraspp_mobilenet_v3_large"](weights=None, weights_backbone=None, num_classes=19)
    bare.load_state_dict(torch.load(tmp_path / "student.pth", weights_only=True), strict=True)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_composes(page, command, tmp_path):
    module, *arguments = shlex.split(command, comments=True)[2:]
    assert (ROOT / "src" / Path(*module.split("."))).with_suffix(".py").is_file()
    folders = []
    if "--config-dir" in arguments:  # of the yaml files that the page shows
        write_files(text(page), tmp_path)
        at = arguments.index("--config-dir")
        folders = [f"hydra.searchpath=[file://{tmp_path / arguments[at + 1]}]"]
        assert (tmp_path / arguments[at + 1]).is_dir()
        del arguments[at : at + 2]
    overrides = []
    for override in OverridesParser.create().parse_overrides([arg for arg in arguments if arg != "-m"]):
        line = override.input_line
        if override.is_sweep_override():
            assert "-m" in arguments
            line = f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        overrides.append(line)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(module.removeprefix("transkd."), overrides=[*folders, *overrides])
    if "channels" in config:  # filled in from the networks
        del config.channels
    assert "???" not in OmegaConf.to_yaml(config)


@pytest.mark.parametrize("page", ["guide"])
def test_every_yaml_is_a_file_of_its_group(page, tmp_path):
    """What is shown without a command that uses it composes as the text says."""
    write_files(text(page), tmp_path)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [f"hydra.searchpath=[file://{tmp_path / 'my'}]", "teacher=fpn"])
    assert config.teacher.network._target_ == "transkd.models.Tapped"
    assert len(config.teacher.network.features) == 4


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_script_exists(command):
    assert (ROOT / shlex.split(command, comments=True)[1]).is_file()


def test_protocols():
    assert [name for name, _ in table("guide", "`protocol=`")] == list(PROTOCOLS)


def test_experiments():
    shown = [name for names, *_ in table("guide", "`+experiment=`") for name in names.split(", ")]
    there = [path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")]
    assert sorted(shown) == sorted(name for name in there if not name.endswith("_teacher"))
    assert {name for name in shown if f"{name}_teacher" not in there} == {"acdc_lvt"}


def test_swept_values_exist():
    lines = [line.values[1] for line in COMMANDS if "train -m " in line.values[1]]
    swept = [found[1] for line in lines if (found := re.search(r"distill=(\S+)", line))]
    assert swept
    for values in swept:
        for value in values.split(","):
            assert (ROOT / "conf" / "distill" / f"{value}.yaml").is_file()


def anchors(page):
    """What a link can point at behind #, as GitHub makes it of a heading."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text(page)):
        path = (PAGES[page].parent / target).resolve() if target else PAGES[page]
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_every_page_is_in_the_index():
    linked = re.findall(r"\]\(docs/(\w+)\.md\)", text("README"))
    assert {page for page, path in PAGES.items() if path.parent == ROOT / "docs"} <= set(linked)

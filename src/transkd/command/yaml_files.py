"""YAML files of a user, looked at before their aliases are expanded: ten lines of them can fill the memory."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from transkd.errors import UserError

__all__ = ["check_config_files", "load_config"]

OPTIONS = ("--config-dir", "-cd", "--config-path", "-cp")
DEPTHS = ("*.yaml", "*/*.yaml", "*/*/*.yaml")
"""Files of a group and of a group within; the folder may be the one that holds the data too."""
MOST = 100_000
"""Values of one file with all aliases expanded; the largest configuration of a run has some hundreds."""


def check_config_files(arguments: Sequence[str]) -> None:
    """Check the files in the folders that a command line names with ``--config-dir`` or ``--config-path``.

    Raises:
        UserError: a file would expand to too many values; names it.
    """
    for part, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = part.partition("=")
        if option in OPTIONS:
            folder = Path(value if equals else following)
            for path in sorted(path for depth in DEPTHS for path in folder.glob(depth)):
                _check_size(path)


def load_config(path: Path) -> DictConfig:
    """Read the configuration of a run.

    Raises:
        UserError: it is no mapping, or would expand to too many values.
    """
    _check_size(path)
    cfg = OmegaConf.load(path)
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{path} is not the configuration of a run: expected settings by name")
    return cfg


def _check_size(path: Path) -> None:
    """Count the values of a file as its aliases expand, from the graph of its nodes, which shares them."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, yaml.SafeLoader) if "*" in text and "&" in text else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # said where the file is read, if it is
        return
    sizes: dict[int, int] = {}

    def size(node: yaml.Node | None) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = MOST  # a node inside itself has no end
            parts = (
                node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
            )
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if size(root) > MOST:
        raise UserError(f"{path}: its aliases (*name) expand to more than {MOST} values; write out what is meant")

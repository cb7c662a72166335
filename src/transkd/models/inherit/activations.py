"""Activations of both networks by batch: a few are stored on disk, the others are computed on demand."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

__all__ = ["Activations", "Batch", "Rule"]


class Batch(dict[str, Any]):
    """Activations of one batch by name; a missing one is computed by its rule or read from disk."""

    def __init__(self, folder: Path, rules: dict[str, "Rule"]) -> None:
        super().__init__()
        self.folder, self.rules = folder, rules

    def __missing__(self, name: str) -> Any:
        rule = self.rules.get(name)
        self[name] = torch.load(self.folder / name, weights_only=True) if rule is None else rule(self)
        return self[name]


Rule = Callable[[Batch], Any]
"""Computes an activation from others of the same batch."""


class Activations:
    """Batches of activations; iterate over them once per fit.

    Only one batch is in memory at a time. Activations kept between fits are stored on disk, in the folder for temporary
    files (``TMPDIR``), until ``close``.

    Example:
        >>> batches = Activations()
        >>> batches.append(x=torch.ones(2))
        >>> batches.define(y=lambda batch: 3 * batch["x"])
        >>> [batch["y"] for batch in batches]
        [tensor([3., 3.])]
        >>> batches.close()
    """

    def __init__(self) -> None:
        self._home = TemporaryDirectory(prefix="transkd_inherit_")
        self._folders: list[Path] = []
        self._rules: dict[str, Rule] = {}

    def __iter__(self) -> Iterator[Batch]:
        for folder in self._folders:
            yield Batch(folder, self._rules)

    def __len__(self) -> int:
        return len(self._folders)

    def append(self, **stored: Any) -> None:
        """Add a batch with these stored activations."""
        folder = Path(self._home.name) / str(len(self))
        folder.mkdir()
        self._folders.append(folder)
        for name, value in stored.items():
            torch.save(value, folder / name)

    def define(self, **rules: Rule) -> None:
        """Define how further activations are computed from stored ones or from each other."""
        self._rules.update(rules)

    def store(self, **sources: str) -> None:
        """Compute activations and store them under new names; removes all rules."""
        for batch in self:
            kept = {name: batch[source] for name, source in sources.items()}
            for name, value in kept.items():
                torch.save(value, batch.folder / name)
        self._rules = {}

    def close(self) -> None:
        """Delete the files."""
        self._home.cleanup()

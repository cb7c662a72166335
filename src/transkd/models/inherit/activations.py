"""Activations of both networks, batch by batch: few are kept, on disk; the others are computed when asked for."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

__all__ = ["Activations", "Batch", "Rule"]


class Batch(dict[str, Any]):
    """One batch's activations by name; what was not asked for yet is computed by its rule or read from disk."""

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
    """The batches, to go through as often as there are fits.

    Memory holds one batch at a time, however many images there are. What lies between two fits is stored on disk (in
    the folder for temporary files, which ``TMPDIR`` names) and removed with ``close``.

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
        """Add a batch of which this is known."""
        folder = Path(self._home.name) / str(len(self))
        folder.mkdir()
        self._folders.append(folder)
        for name, value in stored.items():
            torch.save(value, folder / name)

    def define(self, **rules: Rule) -> None:
        """Say how further activations are computed from those that are there, or from each other."""
        self._rules.update(rules)

    def store(self, **sources: str) -> None:
        """Compute activations and keep them under new names; all rules are forgotten."""
        for batch in self:
            kept = {name: batch[source] for name, source in sources.items()}
            for name, value in kept.items():
                torch.save(value, batch.folder / name)
        self._rules = {}

    def close(self) -> None:
        """Remove what is on disk."""
        self._home.cleanup()

"""Description of a network inside its weights file, from which it can be rebuilt without a configuration."""

from typing import Any

import transkd
from transkd.models.network import Network

__all__ = ["CARD", "describe"]

CARD = "transkd"
"""Key of the description: in safetensors metadata as JSON, in checkpoints as a dict."""


def describe(network: Network, classes: tuple[Any, Any] | None = None, **notes: Any) -> dict[str, Any]:
    """Return the description of a network.

    Args:
        network: the network.
        classes: names and palette (``transkd.data.ClassSet``), if known.
        notes: additional entries, serialisable as JSON.
    """
    card: dict[str, Any] = {
        "transkd_version": transkd.__version__,
        "name": network.name,
        "num_classes": network.num_classes,
        "recipe": network.recipe,
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "lineage": network.lineage,
        **notes,
    }
    if classes is not None:
        card["class_names"], card["palette"] = [list(part) for part in classes]
    return card

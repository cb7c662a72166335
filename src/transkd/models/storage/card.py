"""What a file of weights says of its network, so that it can be built and used again without any config."""

from typing import Any

import transkd
from transkd.models.network import Network

__all__ = ["CARD", "describe"]

CARD = "transkd"
"""The key under which our files describe their network: in safetensors metadata as JSON, in checkpoints as a dict."""


def describe(network: Network, classes: tuple[Any, Any] | None = None, **notes: Any) -> dict[str, Any]:
    """The card of a network.

    Args:
        network: to describe.
        classes: names and palette (``transkd.data.ClassSet``), where they are known.
        notes: anything else worth keeping that JSON can hold.
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

"""A network and its card in one file."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from transkd.files import write_atomically
from transkd.models.network import Network
from transkd.models.storage.card import CARD, describe

__all__ = ["save_segmenter"]


def save_segmenter(network: Network, path: str | Path, classes: tuple[Any, Any] | None = None, **notes: Any) -> None:
    """Write the plain network and its description to one safetensors file, whole or not at all.

    Args:
        network: built by ``create_segmenter``, or any other ``Network``; the latter's file holds the tensors under
            the wrapped module's own names and cannot build it again.
        path: file to write; replaced only once the new one is complete.
        classes: names and palette (``transkd.data.classes.ClassSet``), for pictures and tables later.
        notes: anything else worth keeping that JSON can hold.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata={CARD: json.dumps(describe(network, classes, **notes))})
    write_atomically(path, content)

"""Saving of a network with its description in one file."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from transkd.files import write_atomically
from transkd.models.network import Network
from transkd.models.storage.card import CARD, describe

__all__ = ["save_segmenter"]


def save_segmenter(network: Network, path: str | Path, classes: tuple[Any, Any] | None = None, **notes: Any) -> None:
    """Write a network and its description to a safetensors file, atomically.

    Args:
        network: a network from ``create_segmenter``, or another ``Network``; the file of the latter has the tensor
            names of the wrapped module and cannot rebuild it.
        path: file to write or replace.
        classes: names and palette (``transkd.data.classes.ClassSet``), for pictures and tables.
        notes: additional entries, serialisable as JSON.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata={CARD: json.dumps(describe(network, classes, **notes))})
    write_atomically(path, content)

"""Saving of a network with its description in one file."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from transkd.files import write_atomically
from transkd.models.network import Network
from transkd.models.storage.card import CARD, HASH, describe, fingerprint

__all__ = ["save_segmenter"]


def save_segmenter(network: Network, path: str | Path, classes: tuple[Any, Any] | None = None, **notes: Any) -> None:
    """Write a network and its description to a safetensors file, atomically.

    The description holds a hash of itself and of the tensors, by which a damaged file is found when it is read.

    Args:
        network: a network from ``create_segmenter``, or another ``Network``; the file of the latter has the tensor
            names of the wrapped module and cannot rebuild it.
        path: file to write or replace.
        classes: names and palette (``transkd.data.classes.ClassSet``), for pictures and tables.
        notes: additional entries, serialisable as JSON; reading gives back those of plain text and numbers.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    # through JSON, since that is what a reader hashes: tuples are lists, keys are text
    card = json.loads(json.dumps(describe(network, classes, **notes)))
    card[HASH] = fingerprint(tensors, card)
    write_atomically(path, safetensors.torch.save(tensors, metadata={CARD: json.dumps(card)}))

"""How Lightning's checkpoints reach the disk."""

import io
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from transkd.files import write_atomically

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints through ``write_atomically``; its own go through the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Serialise in memory, then write."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(path, buffer.getbuffer())

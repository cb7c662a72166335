"""Write Lightning's checkpoints atomically."""

import io
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from transkd.files import write_atomically

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints by ``write_atomically``; Lightning's own class uses the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Serialise in memory, then write."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(path, buffer.getbuffer())

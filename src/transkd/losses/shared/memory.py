"""Memory bank of features by class, as used by CIRKD: the buffer, and the selection of what is written to it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.losses.shared.grids import class_members
from transkd.losses.shared.pieces import full_precision

__all__ = ["ClassQueue", "gather_rows", "pixel_keys", "region_keys"]


class ClassQueue(nn.Module):
    """Ring buffer of unit vectors for each class, initialised at random.

    Args:
        num_classes: K.
        slots: M, number of vectors per class.
        channels: C of each vector.

    Attributes:
        vectors: [K, M, C].
        pointer: int64 [K], the slot of each class to be written next.

    Example:
        >>> queue = ClassQueue(num_classes=2, slots=3, channels=1)
        >>> queue.write(torch.arange(4.0)[:, None], torch.zeros(4, dtype=torch.int64))
        >>> queue.vectors[0, :, 0], queue.pointer
        (tensor([3., 1., 2.]), tensor([1, 0]))
    """

    vectors: Tensor
    pointer: Tensor

    def __init__(self, num_classes: int, slots: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(num_classes, slots, channels), dim=2))
        self.register_buffer("pointer", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def write(self, keys: Tensor, classes: Tensor) -> None:
        """Write keys [n, C] of classes [n] in order, each class from its pointer, wrapping around at the end."""
        num_classes, slots, _ = self.vectors.shape
        order, rank, counts = _ranks(classes, num_classes)
        classes = classes[order]
        slot = (self.pointer[classes] + rank) % slots
        last = rank >= counts[classes] - slots  # skip keys that later keys of this call overwrite
        self.vectors[classes[last], slot[last]] = keys[order][last].to(self.vectors)
        self.pointer.copy_((self.pointer + counts) % slots)

    def draw(self, count: int) -> Tensor:
        """Sample `count` slot numbers without replacement, or all if there are fewer."""
        slots = self.vectors.shape[1]
        return torch.randperm(slots, device=self.vectors.device)[:count]


def pixel_keys(
    keys: Tensor, labels: Tensor, valid: Tensor, num_classes: int, limit: int, *, priority: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Select up to `limit` positions of each class in each image.

    Args:
        keys: [B, C, h, w].
        labels: int64 [B, h, w], below `num_classes`.
        valid: bool [B, h, w].
        num_classes: K.
        limit: largest number of positions.
        priority: [B, h, w], positions with the smallest values are selected; None selects at random.

    Returns:
        Keys [n, C] and classes [n], in the order of images, classes and priority.

    Example:
        >>> keys, labels = torch.tensor([1.0, 2, 3]).view(1, 1, 1, 3), torch.tensor([[[1, 0, 1]]])
        >>> chosen, classes = pixel_keys(keys, labels, labels >= 0, 2, limit=1, priority=torch.arange(3).view(1, 1, 3))
        >>> chosen.tolist(), classes.tolist()
        ([[2.0], [1.0]], [0, 1])
    """
    if priority is None:
        priority = torch.rand(labels.shape, device=labels.device)
    image = torch.arange(len(labels), device=labels.device)[:, None, None]
    groups = (image * num_classes + labels)[valid]
    by_priority = priority[valid].argsort(stable=True)
    order, rank, _ = _ranks(groups[by_priority], len(labels) * num_classes)
    chosen = by_priority[order[rank < limit]]
    return keys.permute(0, 2, 3, 1)[valid][chosen], groups[chosen] % num_classes


def region_keys(keys: Tensor, labels: Tensor, valid: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Normalised mean key of each class in each image that contains it.

    Args:
        keys: [B, C, h, w].
        labels: int64 [B, h, w].
        valid: bool [B, h, w].
        num_classes: K.

    Returns:
        Unit vectors [n, C] and classes [n], in the order of images and classes.

    Example:
        >>> keys, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2), torch.ones(1, 1, 2).long()
        >>> region_keys(keys, labels, labels >= 0, 2)
        (tensor([[0.7071, 0.7071]]), tensor([1]))
    """
    members = class_members(labels, valid, num_classes).to(keys.dtype)
    counts = members.sum(2)
    with full_precision(keys):
        means = members @ keys.flatten(2).mT / counts[:, :, None].clamp_min(1)
    image, classes = counts.nonzero(as_tuple=True)
    return F.normalize(means[image, classes], dim=1, eps=1e-12), classes


def _ranks(groups: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort group numbers [n]: return their order, the rank of each within its group, and the group sizes [count]."""
    order = groups.argsort(stable=True)
    sizes = torch.bincount(groups, minlength=count)
    first = sizes.cumsum(0) - sizes
    return order, torch.arange(len(order), device=groups.device) - first[groups[order]], sizes


def gather_rows(keys: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Gather rows [n, C] and [n] from all processes, in the order of ranks; n may differ between them."""
    if not (dist.is_available() and dist.is_initialized()):
        return keys, classes
    counts = _gather(torch.tensor([len(keys)], device=keys.device))
    longest = int(torch.cat(counts).max())
    gathered = []
    for rows in (keys, classes):
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered.append(torch.cat([part[: int(n)] for part, n in zip(_gather(padded), counts, strict=True)]))
    return gathered[0], gathered[1]


def _gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts

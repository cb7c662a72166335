"""Training images without labels beside labelled ones, and the choice of a part of the labels."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler, Sampler

from transkd.data.dataset import Pair
from transkd.data.images import find_images
from transkd.errors import UserError

__all__ = ["MixedSampler", "find_unlabelled", "images_per_batch", "take_labelled"]


def take_labelled(pairs: Sequence[Pair], share: float, seed: int) -> list[Pair]:
    """Take a random share of the pairs, at least one, in their order.

    Example:
        >>> len(take_labelled([Pair(f"{i}.png", f"{i}_label.png") for i in range(10)], 0.25, seed=0))
        2
    """
    if not 0 < share <= 1:
        raise UserError(f"data.labelled={share}: expected a share of the labelled images above 0 and up to 1")
    count = min(len(pairs), max(1, round(share * len(pairs))))
    return [pairs[i] for i in sorted(np.random.default_rng(seed).permutation(len(pairs))[:count])]


def find_unlabelled(pattern: str) -> list[Pair]:
    """Find images without labels: an image, a folder or a glob.

    Raises:
        UserError: there are none.
    """
    try:
        return [Pair(image, None) for image in find_images(pattern).images]
    except UserError as error:
        raise UserError(str(error).replace("input=", "data.unlabelled=")) from error


def images_per_batch(batch_size: int, share: float) -> tuple[int, int]:
    """Numbers of labelled and unlabelled images in each batch.

    Raises:
        UserError: one of them would be 0.

    Example:
        >>> images_per_batch(8, 0.25)
        (6, 2)
    """
    unlabelled = round(share * batch_size)
    if not 0 < unlabelled < batch_size:
        raise UserError(
            f"data.unlabelled_share={share} of data.batch_size={batch_size} is {unlabelled} images; expected at least "
            "one with and one without labels: change the share or raise data.batch_size"
        )
    return batch_size - unlabelled, unlabelled


class MixedSampler(Sampler[Any]):
    """Batches with a fixed number of labelled and of unlabelled images, in this order.

    An epoch is one pass over the labelled images. The unlabelled ones are shuffled and gone through across epochs, each
    once before any a second time. An epoch's data depends only on the seed, the epoch and the rank, as that of
    ``SeededSampler``.

    Args:
        labelled: yields the keys of the labelled images, which come first in the data set.
        num_labelled: number of labelled images in the data set.
        num_unlabelled: number of unlabelled images in the data set.
        per_batch: numbers of labelled and unlabelled images in each batch.
    """

    def __init__(
        self, labelled: DistributedSampler[Any], num_labelled: int, num_unlabelled: int, per_batch: tuple[int, int]
    ) -> None:
        self.labelled, self.per_batch = labelled, per_batch
        self.num_labelled, self.num_unlabelled = num_labelled, num_unlabelled

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.labelled.set_epoch(epoch)

    @property
    def batches(self) -> int:
        """Number of batches in an epoch."""
        return len(self.labelled) // self.per_batch[0]

    def __len__(self) -> int:
        """Number of keys in an epoch."""
        return self.batches * sum(self.per_batch)

    def __iter__(self) -> Iterator[Any]:
        """Yield pairs of index and augmentation seed."""
        labelled, unlabelled = iter(self.labelled), self._unlabelled()
        for _ in range(self.batches):
            yield from islice(labelled, self.per_batch[0])
            yield from islice(unlabelled, self.per_batch[1])

    def _unlabelled(self) -> Iterator[tuple[int, int]]:
        """Yield this rank's keys of unlabelled images; every rank takes each num_replicas-th of one sequence."""
        seed, epoch, ranks = self.labelled.seed, self.labelled.epoch, self.labelled.num_replicas
        place = epoch * self.batches * self.per_batch[1] * ranks + self.labelled.rank
        order, shuffled = np.empty(0, dtype=np.int64), -1
        while True:
            turn, offset = divmod(place, self.num_unlabelled)
            if turn != shuffled:
                order, shuffled = np.random.default_rng((seed, turn)).permutation(self.num_unlabelled), turn
            index = self.num_labelled + int(order[offset])
            yield index, int(np.random.SeedSequence((seed, epoch, index, turn)).generate_state(1)[0])
            place += ranks

"""The data of one run: two splits, their transforms, loaders whose order and augmentation can be repeated exactly."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from transkd.data.classes import CLASS_SETS, ClassSet
from transkd.data.dataset import Batch, Pair, SegmentationDataset
from transkd.errors import UserError
from transkd.metrics import PROTOCOLS

__all__ = ["SeededSampler", "SegmentationDataModule"]


class SeededSampler(DistributedSampler[Any]):
    """Shuffles by (seed, epoch) and hands each sample the seed of its augmentation.

    So an epoch's data depends on the seed, the epoch and the rank alone: not on the number of workers, nor on what
    ran before. A resumed run sees what an undisturbed one would have seen.
    """

    def __iter__(self) -> Iterator[Any]:
        """Pairs of index and augmentation seed."""
        for index in super().__iter__():
            yield index, int(np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0])


def collate(samples: list[Batch]) -> Batch:
    """Samples to a batch.

    Raises:
        UserError: samples of unlike sizes.
    """
    for parts in zip(*(sample[:2] for sample in samples), strict=True):
        if len({part.shape for part in parts}) > 1:
            sizes = "; ".join(f"{sample.name}: {list(sample.image.shape)}" for sample in samples)
            raise UserError(
                f"images and labels of one batch must be of one size, got {sizes}. Add a Resize or a crop to the "
                "transforms, or set data.batch_size=1 (data.eval_batch_size=1 for validation)"
            )
    batch: Batch = default_collate(samples)
    return batch


class SegmentationDataModule(L.LightningDataModule):
    """Train and validation loaders of a folder of images and labels.

    Args:
        find: ``find(root=…, split=…) -> list[Pair]``, for example ``find_acdc``.
        root: where the data lies.
        classes: a name in ``transkd.data.classes.CLASS_SETS`` or a ``ClassSet``.
        num_classes: must be the number of those classes; stated so that networks can refer to it.
        batch_size: training images a step on each device.
        eval_batch_size: images a validation step; 1 suits images of differing size.
        num_workers: loading processes.
        train_transform: Albumentations composition for training images and labels.
        eval_transform: the same for validation; the label follows it unless the protocol wants it at its own size.
        protocol: how scores are taken (``transkd.metrics.PROTOCOLS``).
        seed: of shuffling and augmentation.
        void: label values to ignore beside 255.
        prepare: called once before anything is read, as ``prepare(root=…)``; draws the demo's data.
    """

    def __init__(
        self,
        find: Callable[..., list[Pair]],
        root: str,
        classes: str | ClassSet,
        num_classes: int,
        batch_size: int,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        train_transform: Any = None,
        eval_transform: Any = None,
        protocol: str = "full-res",
        seed: int = 0,
        void: Sequence[int] = (),
        prepare: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(classes, str):
            if classes not in CLASS_SETS:
                raise UserError(f"unknown classes {classes!r}; available: {', '.join(CLASS_SETS)}")
            classes = CLASS_SETS[classes]
        if len(classes.names) != num_classes:
            raise UserError(f"data.num_classes={num_classes}, but the class set has {len(classes.names)} classes")
        if protocol not in PROTOCOLS:
            raise UserError(f"unknown protocol {protocol!r}; available: {', '.join(PROTOCOLS)}")
        self.find, self.root, self.void, self.prepare = find, root, void, prepare
        self.classes, self.num_classes = classes, num_classes
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.protocol, self.seed = protocol, seed
        self._splits: dict[str, SegmentationDataset] = {}
        self._next_epoch = 0

    def prepare_data(self) -> None:
        """Draw what is to be drawn; Lightning calls this on one process alone."""
        if self.prepare is not None:
            self.prepare(root=self.root)

    def dataset(self, split: str) -> SegmentationDataset:
        """The split "train" or "val", its files paired at the first call."""
        if split not in self._splits:
            train = split == "train"
            self._splits[split] = SegmentationDataset(
                self.find(root=self.root, split=split),
                self.classes,
                void=self.void,
                transform=self.train_transform if train else self.eval_transform,
                transform_labels=train or PROTOCOLS[self.protocol].transform_labels,
            )
        return self._splits[split]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled, augmented; the last, smaller batch is dropped."""
        dataset = self.dataset("train")
        world_size, rank = self._place()
        if len(dataset) < self.batch_size * world_size:
            raise UserError(
                f"data.batch_size={self.batch_size} on {world_size} device(s) is more than the "
                f"{len(dataset)} training images; lower it"
            )
        sampler = SeededSampler(dataset, num_replicas=world_size, rank=rank, seed=self.seed, drop_last=True)
        sampler.set_epoch(self._next_epoch)  # Lightning sets it too, but only after loading processes ran ahead
        return self._loader(dataset, self.batch_size, sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every image exactly once, over all devices: none is repeated to fill up a rank."""
        dataset = self.dataset("val")
        world_size, rank = self._place()
        return self._loader(dataset, self.eval_batch_size, range(rank, len(dataset), world_size), drop_last=False)

    def state_dict(self) -> dict[str, int]:
        """Into a checkpoint: the epoch that a resumed run starts with."""
        assert self.trainer is not None
        return {"next_epoch": self.trainer.current_epoch + int(self.trainer.is_last_batch)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Out of a checkpoint."""
        self._next_epoch = state_dict["next_epoch"]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Labels travel as uint8 and become int64 on the device."""
        return batch._replace(target=batch.target.long()) if isinstance(batch, Batch) else batch

    def _place(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _loader(
        self, dataset: SegmentationDataset, batch_size: int, sampler: Any, drop_last: bool
    ) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=drop_last,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # its own, or each new iterator would move the global one that dropout reads
        )

"""Data module of a run: train and validation splits, transforms, reproducible loaders."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from transkd.data.classes import ClassSet, class_set
from transkd.data.dataset import UNLABELLED_BYTE, Batch, PlacedBatch, SegmentationDataset
from transkd.data.feeding.device import DeviceAugmentation, on_device
from transkd.data.feeding.frame_cache import FrameCache
from transkd.data.feeding.planning import PlannedBatch, PlannedDataset, collate_planned
from transkd.data.labels import LabelFormat
from transkd.data.listing import Pair
from transkd.data.unlabelled import MixedSampler, find_unlabelled, images_per_batch, take_labelled
from transkd.errors import UserError
from transkd.metrics import PROTOCOLS
from transkd.outputs import UNLABELLED

__all__ = ["SeededSampler", "SegmentationDataModule"]


class SeededSampler(DistributedSampler[Any]):
    """Shuffle by (seed, epoch) and yield each index with the seed of its augmentation.

    An epoch's data depends only on the seed, the epoch and the rank, not on the number of workers or the global random
    state, so a resumed run gets the same data as an uninterrupted one.
    """

    def __iter__(self) -> Iterator[Any]:
        """Yield pairs of index and augmentation seed."""
        for index in super().__iter__():
            yield index, int(np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0])


def collate(samples: Sequence[Batch | PlacedBatch]) -> Batch | PlacedBatch:
    """Collate samples to a batch.

    Raises:
        UserError: the samples differ in size.
    """
    if len({sample.image.shape for sample in samples}) > 1:
        sizes = "; ".join(f"{sample.name}: {list(sample.image.shape)}" for sample in samples)
        raise UserError(
            f"images and labels of a batch must have the same size, got {sizes}. Add a Resize or a crop to the "
            "transforms, or set data.batch_size=1 (data.eval_batch_size=1 for validation)"
        )
    if len({sample.target.shape for sample in samples}) > 1:  # in validation alone, the transform resizes no labels
        sizes = "; ".join(f"{sample.name}: {list(sample.target.shape)}" for sample in samples)
        raise UserError(
            f"labels of a batch must have the same size, got {sizes}. Where they are scored at their own size, set "
            "data.eval_batch_size=1"
        )
    batch: Batch = default_collate([Batch(*sample[:3]) for sample in samples])
    places = [getattr(sample, "place", None) for sample in samples]
    if all(place is None for place in places):
        return batch
    place = torch.stack([torch.eye(2, 3) if place is None else place for place in places])
    return PlacedBatch(*batch, place.view(torch.int32))  # bits, which Lightning does not round: see PlannedBatch


class SegmentationDataModule(L.LightningDataModule):
    """Train and validation loaders of a folder of images and labels.

    Args:
        find: ``find(root=…, split=…) -> list[Pair]``, for example ``find_acdc``.
        root: folder of the data set.
        classes: a name in ``transkd.data.classes.CLASS_SETS`` or a ``ClassSet``.
        num_classes: number of those classes; a separate setting so that networks can refer to it.
        batch_size: training images per step and device.
        eval_batch_size: images per validation step; use 1 for images of different sizes.
        num_workers: worker processes of each loader.
        train_transform: Albumentations transform for training images and labels.
        eval_transform: Albumentations transform for validation; applied to labels unless the protocol scores at their
            original size.
        protocol: evaluation protocol (``transkd.metrics.PROTOCOLS``).
        seed: seed of shuffling and augmentation.
        void: label values to ignore in addition to 255.
        labelled: share of the labelled training images to use, chosen by the seed.
        unlabelled: training images without labels: a folder or a glob.
        unlabelled_share: share of each batch that they take.
        label: how label files are read: maps of ids, colours, orientation.
        prepare: called as ``prepare(root=…)`` once before the data set is read; generates the demo's data.
        conditions: names of folders in the images' paths, such as fog; scores are given for each of them too.
        cache: folder to keep decoded, resized frames in (``transkd.data.feeding.FrameCache``); None reads the files.
        augment: "cpu" applies ``train_transform`` in the loader's workers; "device" draws its parameters there and
            applies them in batches on the network's device; "auto" is "device" on an NVIDIA GPU. Transforms that have
            no equivalent on the device stay on the CPU.
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
        labelled: float = 1.0,
        unlabelled: str | None = None,
        unlabelled_share: float = 0.5,
        prepare: Callable[..., Any] | None = None,
        conditions: Sequence[str] = (),
        label: LabelFormat | None = None,
        cache: str | None = None,
        augment: Literal["cpu", "device", "auto"] = "auto",
    ) -> None:
        super().__init__()
        classes = class_set(classes)
        if len(classes.names) != num_classes:
            raise UserError(f"data.num_classes={num_classes}, but the class set has {len(classes.names)} classes")
        if protocol not in PROTOCOLS:
            raise UserError(f"unknown protocol {protocol!r}; available: {', '.join(PROTOCOLS)}")
        if not callable(find):
            raise UserError(
                f"data.find={find}: expected a function, such as {{_target_: transkd.data.find_acdc, _partial_: true}}"
            )
        self.find, self.root, self.void, self.prepare = find, root, void, prepare
        self.label = label
        self.classes, self.num_classes = classes, num_classes
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.protocol, self.seed, self.conditions = protocol, seed, tuple(conditions)
        self.labelled, self.unlabelled = labelled, unlabelled
        self.per_batch = (batch_size, 0) if unlabelled is None else images_per_batch(batch_size, unlabelled_share)
        self.cache, self.augment = cache, augment
        self._splits: dict[str, SegmentationDataset] = {}
        self._caches: dict[str, FrameCache] = {}  # until they are filled
        self._augmentation: DeviceAugmentation | None = None
        self._next_epoch = 0

    def prepare_data(self) -> None:
        """Generate the data and fill the cache; Lightning runs this hook in one process only."""
        self.generate()
        if self.cache is not None:
            self.fill_cache(("val",) if self._only_validates() else ("train", "val"))

    def generate(self) -> None:
        """Call ``prepare``, which writes what is missing of the data set."""
        if self.prepare is not None:
            self.prepare(root=self.root)

    def fill_cache(self, splits: Sequence[str]) -> None:
        """Write the frames of splits that the cache lacks."""
        for split in splits:
            self.dataset(split)
            cache = self._caches.pop(split, None)
            if cache is not None:
                cache.fill(self.num_workers)

    def dataset(self, split: str) -> SegmentationDataset:
        """Return the split "train" or "val"; its files are searched at the first call."""
        if split not in self._splits:
            self.use(split, self.find(root=self.root, split=split))
        return self._splits[split]

    def use(self, split: str, pairs: Sequence[Pair]) -> SegmentationDataset:
        """Use these pairs as a split from now on; the settings add unlabelled images to "train" and reduce its labels.

        Raises:
            UserError: there are no unlabelled images although a folder or a glob of them is given.
        """
        train = split == "train"
        if train:
            pairs = take_labelled(pairs, self.labelled, self.seed)
            pairs += find_unlabelled(self.unlabelled) if self.unlabelled is not None else []
        self._splits[split] = SegmentationDataset(
            pairs,
            self.classes,
            void=self.void,
            transform=self.train_transform if train else self.eval_transform,
            transform_labels=train or PROTOCOLS[self.protocol].transform_labels,
            ignore_padding=not train,
            label=self.label,
        )
        if self.cache is not None:
            self._caches[split] = FrameCache(self._splits[split], self.cache, split)
            self._caches[split].attach()
        return self._splits[split]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the shuffled, augmented training split; an incomplete last batch is dropped."""
        dataset = self.dataset("train")
        world_size, rank = self._world_size_and_rank()
        self.check_batch_size(world_size)
        labelled: Any = range(dataset.labelled)
        sampler: Any = SeededSampler(labelled, num_replicas=world_size, rank=rank, seed=self.seed, drop_last=True)
        if self.unlabelled is not None:
            sampler = MixedSampler(sampler, dataset.labelled, len(dataset) - dataset.labelled, self.per_batch)
        sampler.set_epoch(self._next_epoch)  # Lightning sets it too, but after workers have prefetched
        if self._augments_on_device():
            self._augmentation = on_device(dataset.transform, self.augment)
        if self._augmentation is not None:
            plans = PlannedDataset(dataset, self._augmentation.plan)
            return self._loader(plans, self.batch_size, sampler, drop_last=True, collate_fn=collate_planned)
        return self._loader(dataset, self.batch_size, sampler, drop_last=True)

    def batches(self, world_size: int = 1) -> int:
        """Number of training batches of each device in an epoch, a pass over the labelled images."""
        return self.dataset("train").labelled // world_size // self.per_batch[0]

    def check_batch_size(self, world_size: int = 1) -> None:
        """Check that there are enough training images for a step.

        Raises:
            UserError: there are fewer than a batch on each device.
        """
        if not self.batches(world_size):
            some = "" if self.unlabelled is None else f", {self.per_batch[0]} of them labelled,"
            raise UserError(
                f"data.batch_size={self.batch_size}{some} on {world_size} device(s) is more than the "
                f"{self.dataset('train').labelled} training images{some and ' with labels'}; lower it"
            )

    def val_dataloader(self) -> DataLoader[Batch | PlacedBatch]:
        """Return the loader of the validation split: every image exactly once over all devices, without padding."""
        dataset = self.dataset("val")
        world_size, rank = self._world_size_and_rank()
        return self._loader(dataset, self.eval_batch_size, range(rank, len(dataset), world_size), drop_last=False)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch at which a resumed run continues."""
        assert self.trainer is not None
        return {"next_epoch": self.trainer.current_epoch + int(self.trainer.is_last_batch)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the epoch from a checkpoint."""
        self._next_epoch = state_dict["next_epoch"]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment planned batches, and convert labels to int64 on the device; they are transferred as uint8."""
        if isinstance(batch, PlannedBatch):
            assert self._augmentation is not None
            batch = self._augmentation.apply(batch)
        if isinstance(batch, PlacedBatch):
            batch = batch._replace(place=batch.place.view(torch.float32))
        if not isinstance(batch, Batch | PlacedBatch):
            return batch
        target = batch.target.long()
        if self.unlabelled is not None:
            target = target.masked_fill(target == UNLABELLED_BYTE, UNLABELLED)
        return batch._replace(target=target)

    def _augments_on_device(self) -> bool:
        strategy = getattr(self.trainer, "strategy", None)
        on_gpu = strategy is not None and strategy.root_device.type == "cuda"
        return self.augment == "device" or (self.augment == "auto" and on_gpu)

    def _only_validates(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING

    def _world_size_and_rank(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _loader(
        self, dataset: Dataset[Any], batch_size: int, sampler: Any, drop_last: bool, collate_fn: Any = collate
    ) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=drop_last,
            collate_fn=collate_fn,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # separate: iterators would advance the global generator that dropout uses
        )

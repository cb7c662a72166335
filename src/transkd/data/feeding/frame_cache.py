"""Decoded frames on disk: images and labels as uint8 arrays, read through a memory map."""

import hashlib
import io
import json
import logging
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from transkd.data.dataset import SegmentationDataset
from transkd.data.feeding.heads import split_transform
from transkd.errors import UserError
from transkd.files import write_atomically

__all__ = ["FrameCache"]

log = logging.getLogger(__name__)

FORMAT = 1  # increase it whenever the same recipe gives other arrays
PROBES = 4  # frames that are written first, to estimate space and time
ABANDONED = 3600  # seconds after which a temporary file is of a process that was killed

Frame = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
"""Image [H, W, 3] and label [H, W]."""


class FrameCache:
    """Frames of a data set, decoded and resized once.

    A frame is what ``SegmentationDataset.read`` returns, after the deterministic head of the transform (leading
    ``Resize``, ``SmallestMaxSize`` or ``LongestMaxSize``). Two files hold it, image and label, whose name is a
    fingerprint of the paths, sizes and modification times of its sources; the folder's name is one of the head, the
    label values and the versions of the libraries that decode and resize. So nothing outdated is ever read, and
    several data sets, transforms and runs can share a folder.

    Args:
        dataset: its frames; ``attach`` makes it read them here.
        folder: folder of all caches (``data.cache``).
        split: first part of the name of this one.
    """

    def __init__(self, dataset: SegmentationDataset, folder: str | Path, split: str) -> None:
        self.dataset = dataset
        self.split = split
        self.head, self.rest = split_transform(dataset.transform)
        recipe = {
            "format": FORMAT,
            "head": None if self.head is None else self.head.to_dict(),
            "transform_labels": dataset.transform_labels,
            "labels": [dataset.label_reader.table.tolist(), asdict(dataset.label_reader.form), dataset.classes.palette],
            "versions": {"opencv": cv2.__version__, **{name: version(name) for name in ("albumentations", "pillow")}},
        }
        self.recipe = json.dumps(recipe, sort_keys=True, default=str)
        self.folder = Path(folder).expanduser().absolute() / f"{split}_{_hash(self.recipe)[:12]}"
        self._names: dict[Any, str] = {}

    def attach(self) -> None:
        """Let the data set read its frames here, and apply only the rest of its transform to them."""
        self.dataset.use_frames(self.frame, self.rest)

    def frame(self, index: int) -> Frame:
        """Return a frame as read-only memory maps, or compute it if it is not cached."""
        try:
            return self._load(self._name(index))
        except (OSError, ValueError):
            return self._compute(index)

    def fill(self, threads: int = 1) -> None:
        """Write all missing, outdated and damaged frames; continues where a killed process stopped.

        Raises:
            UserError: a file of the data set is damaged, or the disk is too small or not writable.
        """
        self._make_folder()
        missing = [index for index in range(len(self.dataset)) if not self._is_whole(self._name(index))]
        if not missing:
            log.info("data.cache: all %d frames of %s are in %s", len(self.dataset), self.split, self.folder)
            return
        again = self._remove_outdated(missing)
        if again:
            log.warning(
                "data.cache: %d frames of %s have changed since they were cached, are incomplete or damaged, and are "
                "written again",
                again,
                self.split,
            )
        started = time.perf_counter()
        probes, others = missing[:: -(-len(missing) // PROBES)], set(missing)
        size = self._write_all(probes, threads) / len(probes)
        each = (time.perf_counter() - started) / len(probes)
        others -= set(probes)
        if others:
            self._announce(len(others), size, each * len(others))
        written = size * len(probes) + self._write_all(sorted(others), threads)
        minutes = (time.perf_counter() - started) / 60
        log.info("data.cache: wrote %d frames, %s, in %.1f minutes", len(missing), _gigabytes(written), minutes)

    def _announce(self, count: int, size: float, seconds: float) -> None:
        needed, free = count * size, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"data.cache={self.folder.parent}: {count} more frames of {self.split} take about "
                f"{_gigabytes(needed)}, but {_gigabytes(free)} are free; name a folder on a larger disk, start the "
                "transform with a Resize, or leave data.cache out"
            )
        log.info(
            "data.cache: writing %d frames of %s to %s: about %s (%s are free), about %.1f minutes",
            count,
            self.split,
            self.folder,
            _gigabytes(needed),
            _gigabytes(free),
            seconds / 60,
        )

    def _make_folder(self) -> None:
        write_atomically(self.folder / "recipe.json", self.recipe.encode())
        for path in self.folder.glob(".*"):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink(missing_ok=True)

    def _remove_outdated(self, missing: Sequence[int]) -> int:
        """Remove the files that earlier versions of these frames left; return how many frames had some."""
        sources = {self._name(index).split("-")[0] for index in missing}
        found = [path for path in self.folder.glob("*.npy") if path.name.split("-")[0] in sources]
        for path in found:
            path.unlink(missing_ok=True)
        return len({path.name.split("-")[0] for path in found})

    def _write_all(self, indices: Sequence[int], threads: int) -> int:
        """Write frames; return their bytes. Decoding and resizing release the interpreter, so threads are enough."""
        console = Console(stderr=True)
        pool = ThreadPoolExecutor(max(1, threads))
        try:
            written = track(
                pool.map(self._write, indices),
                f"Caching {self.split}",
                total=len(indices),
                transient=True,
                console=console,
                disable=not console.is_terminal,
            )
            return sum(written)
        finally:
            pool.shutdown(cancel_futures=True)

    def _write(self, index: int) -> int:
        frame = self._compute(index)
        for array, path in zip(frame, self._paths(self._name(index)), strict=True):
            content = io.BytesIO()
            np.save(content, array)
            write_atomically(path, content.getbuffer())
        return sum(array.nbytes for array in frame)

    def _compute(self, index: int) -> Frame:
        image, label = self.dataset.read(index)
        if self.head is None:
            return image, label
        if not self.dataset.transform_labels:
            return self.head(image=image)["image"], label
        resized = self.head(image=image, mask=label)
        return resized["image"], resized["mask"]

    def _name(self, index: int) -> str:
        pair = self.dataset.pairs[index]
        if pair not in self._names:
            paths = [path.absolute() for path in pair if path is not None]
            stats = [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in paths if path.exists())]
            self._names[pair] = f"{_hash(*map(str, paths))[:20]}-{_hash(str(stats))[:20]}"
        return self._names[pair]

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.image.npy", self.folder / f"{name}.label.npy"

    def _load(self, name: str) -> Frame:
        image, label = (np.asarray(np.load(path, mmap_mode="r")) for path in self._paths(name))
        return image, label

    def _is_whole(self, name: str) -> bool:
        try:
            image, label = self._load(name)
        except (OSError, ValueError):
            return False
        return image.dtype == label.dtype == np.uint8 and (image.ndim, label.ndim) == (3, 2)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"

"""NYU Depth v2 (Silberman et al., ECCV 2012): indoor scenes with the 40 classes of Gupta et al. (CVPR 2013)."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from transkd.data.listing import Pair, by_stem, elsewhere, read_names
from transkd.data.writing import save_png
from transkd.errors import UserError
from transkd.files import write_atomically
from transkd.outputs import IGNORE

__all__ = ["find_nyuv2", "prepare_nyuv2"]

LABELED, SPLITS, MAPPING = "nyu_depth_v2_labeled.mat", "splits.mat", "classMapping40.mat"
OFFICIAL = {"train": "trainNdxs", "val": "testNdxs"}
ORIGINAL_CLASSES, CLASSES = 894, 40
LAYOUT = (
    f"images/<id>.png (or .jpg), labels/<id>.png, train.txt and val.txt with an id per line; or the official files "
    f"{LABELED}, {SPLITS} and {MAPPING}, which the first run converts"
)

Array = npt.NDArray[Any]


def find_nyuv2(root: str | Path, split: str) -> list[Pair]:
    """Find the images ``images/<id>.*`` and labels ``labels/<id>.png`` of the ids in ``<split>.txt``.

    Labels are class ids from 0, 255 = ignored: `transkd.data.classes.NYUV2` or, without *otherprop*, `NYUV2_39`.
    `prepare_nyuv2` converts the official files to this layout.

    Args:
        root: folder of the data set.
        split: "train" (795 images of the official split) or "val" (its 654 test images).

    Raises:
        UserError: the split file does not exist or is empty, an id has no image, no label or two images.
    """
    root = Path(root)
    index = root / f"{split}.txt"
    if not index.is_file():
        raise UserError(
            f"no NYUv2 split {split}.txt under data.root={root}: expected {LAYOUT}{elsewhere(root, index.name)}"
        )
    ids = read_names(index, "NYUv2")
    images, labels = (by_stem((root / folder).glob("*")) for folder in ("images", "labels"))
    missing = [f"images/{i}.png" for i in ids if i not in images]
    missing += [f"labels/{i}.png" for i in ids if i not in labels]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{index} lists {len(ids)} ids; missing are {', '.join(missing[:3])}{more}: expected {LAYOUT}")
    return [Pair(images[i], labels[i]) for i in ids]


def prepare_nyuv2(root: str | Path) -> None:
    """Convert the official files in ``root`` to the layout of `find_nyuv2`, once; do nothing without them.

    ``nyu_depth_v2_labeled.mat`` is read by h5py, ``splits.mat`` and ``classMapping40.mat`` by SciPy
    (``pip install 'transkd[nyuv2]'``). Ids are the 1-based indices of the official file. The split files are
    written last; an interrupted conversion continues with the missing files.

    Args:
        root: folder with the three files; the converted files are written there.

    Raises:
        UserError: h5py or SciPy is not installed, or a file is missing, damaged or not the official one.
    """
    root = Path(root)
    if not (root / LABELED).is_file() or all((root / f"{split}.txt").is_file() for split in OFFICIAL):
        return
    h5py, scipy_io = _import_for_mat("h5py"), _import_for_mat("scipy.io")
    for name in (SPLITS, MAPPING):
        if not (root / name).is_file():
            raise UserError(f"{root} has {LABELED}, but no {name}: converting it needs {LABELED}, {SPLITS}, {MAPPING}")
    try:
        file = h5py.File(root / LABELED, "r")
    except OSError as error:
        raise UserError(f"{root / LABELED} is not a MATLAB v7.3 (HDF5) file or is damaged ({error})") from error
    with file:
        images, labels = _labeled_data(file, root / LABELED)
        table = _class_table(_read_mat(scipy_io, root / MAPPING, ["mapClass"])["mapClass"], root / MAPPING)
        splits = _split_indices(_read_mat(scipy_io, root / SPLITS, OFFICIAL.values()), len(images), root / SPLITS)
        _convert(root, images, labels, table, sorted({i for indices in splits.values() for i in indices}))
    for split, indices in splits.items():
        write_atomically(root / f"{split}.txt", "".join(f"{i:04d}\n" for i in indices).encode())


def _import_for_mat(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"converting {LABELED} needs {module.split('.')[0]}: pip install 'transkd[nyuv2]', or convert it elsewhere "
            "to images/<id>.png, labels/<id>.png, train.txt and val.txt"
        ) from error


def _labeled_data(file: Any, path: Path) -> tuple[Any, Any]:
    """Return the data sets of images [N, 3, W, H] and labels [N, W, H]; MATLAB's dimensions are reversed."""
    images, labels = (list(getattr(file.get(name), "shape", ())) for name in ("images", "labels"))
    if len(images) != 4 or images[1] != 3 or [images[0], *images[2:]] != labels:
        raise UserError(
            f"{path} is not the labelled data set of NYUv2: expected images [N, 3, W, H] and labels [N, W, H], got "
            f"images {images or 'missing'}, labels {labels or 'missing'}"
        )
    return file["images"], file["labels"]


def _read_mat(scipy_io: Any, path: Path, names: Any) -> dict[str, Array]:
    try:
        content = scipy_io.loadmat(path)
    except Exception as error:  # damaged files raise many types of exceptions
        raise UserError(f"{path} is not a MATLAB file or is damaged ({error})") from error
    missing = [name for name in names if name not in content]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}: is it the official {path.name}?")
    return {name: content[name] for name in names}


def _class_table(mapping: Array, path: Path) -> npt.NDArray[np.uint8]:
    """Table from the 894 original labels, 0 = unlabelled, to class ids from 0, 255 = ignored."""
    classes = mapping.ravel()
    if len(classes) != ORIGINAL_CLASSES or not np.isin(classes, np.arange(1, CLASSES + 1)).all():
        raise UserError(f"{path}: mapClass must map {ORIGINAL_CLASSES} labels to 1…{CLASSES}; got {len(classes)}")
    return np.concatenate([[IGNORE], classes - 1]).astype(np.uint8)


def _split_indices(content: dict[str, Array], count: int, path: Path) -> dict[str, list[int]]:
    """Return the 1-based indices of the images of each split."""
    splits = {split: [int(i) for i in content[name].ravel()] for split, name in OFFICIAL.items()}
    outside = [i for indices in splits.values() for i in indices if not 1 <= i <= count]
    if outside:
        raise UserError(f"{path} has the index {outside[0]}, but {LABELED} has {count} images: check both files")
    return splits


def _convert(root: Path, images: Any, labels: Any, table: npt.NDArray[np.uint8], indices: list[int]) -> None:
    console = Console(stderr=True)
    for i in track(indices, "Converting NYUv2", transient=True, console=console, disable=not console.is_terminal):
        image, label = root / "images" / f"{i:04d}.png", root / "labels" / f"{i:04d}.png"
        if not image.is_file():
            save_png(np.asarray(images[i - 1]).transpose(2, 1, 0), image, compress_level=3)
        if not label.is_file():
            stored = np.asarray(labels[i - 1]).T
            if stored.max(initial=0) >= len(table):
                raise UserError(
                    f"{root / LABELED}: image {i} has the label {stored.max()}, expected 0…{ORIGINAL_CLASSES}"
                )
            save_png(table[stored], label, compress_level=3)

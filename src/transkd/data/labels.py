"""From the values or colours of label files to class ids."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from transkd.data.classes import ClassSet
from transkd.data.polygons import read_yolo
from transkd.data.reading import SWAPPED, Stored, read_stored, turn
from transkd.errors import UserError
from transkd.outputs import IGNORE

__all__ = ["LabelFormat", "LabelReader"]

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.uint8]

UNKNOWN = 254  # marks values outside the classes
VALUES = 1 << 16  # of 16-bit labels
BLACK = (0, 0, 0)
IGNORABLE = 3  # so many unknown values are probably to be ignored


@dataclass(frozen=True)
class LabelFormat:
    """How label files are read; ``data.label`` in the configuration.

    Attributes:
        ids: class of each stored value: a class id, a class name, or null = ignored. The key "other" stands for all
            values that are not listed; 255 stays ignored unless it is listed itself. Without a map the stored
            values are class ids.
        reduce_zero_label: the stored value 0 is ignored, k is class k-1.
        colors: true reads the colours of an RGB or palette label, which must be those of the classes; false reads the
            values of a palette label whatever its colours; null reads them unless a colour is that of another class.
        ignored_colors: colours that are ignored with ``colors=true``.
        orientation: of the labels of images with an EXIF orientation: "shown" (upright), "stored" (turned like the
            image's stored pixels), or "auto", which tells the two by height and width.
    """

    ids: Mapping[int | str, int | str | None] | None = None
    reduce_zero_label: bool = False
    colors: bool | None = None
    ignored_colors: Sequence[Sequence[int]] = (BLACK,)
    orientation: Literal["auto", "shown", "stored"] = "auto"

    def __post_init__(self) -> None:
        """Refuse settings that exclude each other."""
        given = [name for name in ("ids", "reduce_zero_label", "colors") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"data.label.{given[0]} and data.label.{given[1]} exclude each other; remove one")


class LabelReader:
    """Reads label files as class ids.

    Args:
        classes: names and colours of the ids 0 … K-1.
        void: stored values to ignore, in addition to 255.
        form: how the files are to be read.

    Raises:
        UserError: the settings name a class that does not exist, or there are more than 254 classes.
    """

    def __init__(self, classes: ClassSet, void: Sequence[int] = (), form: LabelFormat | None = None) -> None:
        self.classes, self.void, self.form = classes, tuple(void), form or LabelFormat()
        self.names = len(classes.names)
        self.palette = [tuple(colour) for colour in classes.palette]
        self._conflicts: dict[bytes, list[int]] = {}
        if self.names > UNKNOWN:
            raise UserError(f"the class set has {self.names} classes; class ids are bytes, so at most {UNKNOWN} fit")
        self.table = np.full(VALUES, UNKNOWN, dtype=np.uint8)
        if self.form.ids is not None:
            self._map(self.form.ids)
        else:
            first = int(self.form.reduce_zero_label)
            self.table[first : first + self.names] = np.arange(self.names)
            self.table[:first] = IGNORE
        self.table[[*({IGNORE} - _whole_numbers(self.form.ids)), *void]] = IGNORE
        self.colours = self._colour_table() if self.form.colors else None

    def read(
        self, path: Path, size: tuple[int, int] | None, orientation: int = 1, image: str | Path = "the image"
    ) -> Ids:
        """Read a label as class ids [H, W] that lie on the upright image.

        Args:
            path: a label image, or a text file of YOLO polygons.
            size: height and width of the upright image; None if it is unknown, for a label image that is only examined.
            orientation: EXIF orientation that the image is stored in.
            image: for the message.

        Raises:
            UserError: the file is not readable, has values outside the classes or another size than the image.
        """
        if path.suffix.lower() == ".txt":
            known = self.names if self.form.ids is None else UNKNOWN  # a map says itself what it knows
            more = np.flatnonzero(self.table[:IGNORE] != UNKNOWN).tolist()  # ids in data.void, or one up
            return self.to_ids(Stored(read_yolo(path, size or (1, 1), known, more)), path)
        ids = self.to_ids(read_stored(path, colours=bool(self.form.colors)), path)
        if size is None:
            return ids
        if orientation != 1:
            ids = self._turned(ids, path, size, orientation)
        if ids.shape != size:
            raise UserError(
                f"image and label differ in size: {image} is {size[0]}×{size[1]}, {path} is "
                f"{ids.shape[0]}×{ids.shape[1]}"
            )
        return ids

    def to_ids(self, stored: Stored, path: Path) -> Ids:
        """Class ids [H, W] of stored values or colours.

        Raises:
            UserError: values outside the classes, or colours where values are expected; says which setting reads them.
        """
        values = stored.values
        if self.colours is not None:
            return self._from_colours(values, path)
        if values.ndim == 3:
            raise UserError(self._about_colours(values, path))
        if values.dtype.kind not in "ui" or (
            values.dtype != np.uint8 and not 0 <= values.min() <= values.max() < VALUES
        ):
            raise UserError(
                f"{path}: a label must be a single-channel image of class ids from 0 to {VALUES - 1}, got values "
                f"{values.min()}…{values.max()}"
            )
        if stored.palette is not None and self.form.colors is None:
            self._check_palette(stored, path)
        ids = self.table[values]
        unknown = ids == UNKNOWN
        if unknown.any():
            raise UserError(self._about_values(np.unique(values[unknown]).tolist(), values, path))
        return ids

    def check_masks(self, stored: Iterable[tuple[Path, Stored]]) -> None:
        """Check that the labels of two classes are not masks of 0 and 255, of which 255 would be ignored.

        Raises:
            UserError: no label has a value other than 0 and 255, and one has 255.
        """
        said = IGNORE in _whole_numbers(self.form.ids) or self.form.colors or self.form.reduce_zero_label
        if self.names != 2 or said:
            return
        seen: set[int] = set()
        for path, label in stored:
            seen |= set(np.unique(label.values).tolist()) if label.values.ndim == 2 else {1}
            example = path
        if IGNORE in seen and seen <= {0, IGNORE}:
            raise UserError(
                f"{example}: labels have only the values 0 and 255, and 255 is ignored: masks of two classes are read "
                "with data.label.ids={0:0,255:1}; if 255 is to be ignored, say so with "
                "data.label.ids={0:0,1:1,255:null}"
            )

    def _map(self, ids: Mapping[int | str, int | str | None]) -> None:
        for value, name in sorted(ids.items(), key=lambda entry: entry[0] != "other"):  # listed values after "other"
            if value != "other" and not (isinstance(value, int) and 0 <= value < VALUES):
                raise UserError(f"data.label.ids has the key {value!r}: expected 0 … {VALUES - 1} or other")
            place = value if isinstance(value, int) else slice(None)
            self.table[place] = self._class_id(value, name)

    def _class_id(self, value: int | str, name: int | str | None) -> int:
        if name is None or name == IGNORE:
            return IGNORE
        if isinstance(name, str) and name in self.classes.names:
            return self.classes.names.index(name)
        if isinstance(name, int) and 0 <= name < self.names:
            return name
        raise UserError(
            f"data.label.ids maps {value} to {name!r}: expected null, a class id 0 … {self.names - 1} or one of "
            f"{', '.join(self.classes.names)}"
        )

    def _colour_table(self) -> Ids:
        """Class ids of all 2²⁴ colours."""
        table = np.full(1 << 24, UNKNOWN, dtype=np.uint8)
        table[_codes(np.array(self.form.ignored_colors, dtype=np.uint8).reshape(-1, 3))] = IGNORE
        for i in reversed(range(self.names)):  # of two classes with one colour the first
            table[_codes(np.array(self.palette[i], dtype=np.uint8))] = i
        return table

    def _from_colours(self, values: Array, path: Path) -> Ids:
        assert self.colours is not None
        if values.ndim == 2:
            if values.max(initial=0) > 255:
                raise UserError(
                    f"{path} has grey values of 16 bits, up to {values.max()}, but data.label.colors=true reads "
                    "colours of 8 bits; map the values with data.label.ids instead"
                )
            values = np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)
        ids = self.colours[_codes(values)]
        unknown = ids == UNKNOWN
        if unknown.any():
            colours = np.unique(values[unknown], axis=0)
            raise UserError(
                f"{path} has colours that are no class's, {_few(colours.tolist())}: set data.classes.palette to the "
                "colours of the labels, or data.label.ignored_colors to those without a class"
            )
        return ids

    def _about_colours(self, values: Array, path: Path) -> str:
        """What is said of an RGB label that is not read by colour."""
        colours = {tuple(colour) for colour in np.unique(values.reshape(-1, 3), axis=0).tolist()}
        ours = colours & set(self.palette)
        if ours:
            return (
                f"{path} is an RGB image, {len(ours)} of its {len(colours)} colours are colours of the classes: read "
                "it with data.label.colors=true"
            )
        return (
            f"{path}: a label must be a single-channel image of class ids, got RGB with the colours "
            f"{_few(sorted(map(list, colours)))}; if they stand for classes, set data.classes.palette to them and "
            "data.label.colors=true"
        )

    def _about_values(self, unknown: list[int], values: Array, path: Path) -> str:
        """What is said of values that no class has."""
        shown = _few(unknown)
        if self.form.ids is not None:
            return f"{path}: label values {shown} are not in data.label.ids; add them, or other:null to ignore them"
        entries = ",".join(f"{value}:…" for value in np.unique(values)[:6])
        hint = f"map all values with data.label.ids={{{entries}}} (a class, or null = ignored)"
        if len(unknown) <= IGNORABLE and max(unknown) < IGNORE:
            ignored = ",".join(map(str, sorted({*self.void, *unknown})))
            hint += f", or ignore {unknown} with data.void=[{ignored}]"
        if unknown == [self.names] and not self.form.reduce_zero_label:
            hint = f"if 0 is to be ignored and k is class k-1, set data.label.reduce_zero_label=true; otherwise {hint}"
        if max(unknown) > IGNORE:
            hint = (
                "values above 255 often number objects (class·256 + object, class·1000 + object): take the label "
                f"images without objects, or {hint}"
            )
        outside = f"are outside the {self.names} classes 0…{self.names - 1} (255 = ignore)"
        return f"{path}: label values {shown} {outside}; {hint}"

    def _check_palette(self, stored: Stored, path: Path) -> None:
        """Refuse a palette label one of whose colours is that of another class."""
        assert stored.palette is not None
        key = stored.palette.tobytes()
        if key not in self._conflicts:
            colours = [tuple(colour) for colour in stored.palette.tolist()]
            self._conflicts[key] = [
                value
                for value, colour in enumerate(colours)
                if colour in self.palette
                and self.table[value] != IGNORE
                and (self.table[value] == UNKNOWN or colour != self.palette[self.table[value]])
            ]
        for value in self._conflicts[key]:
            if (stored.values == value).any():
                name = (
                    "no class" if self.table[value] == UNKNOWN else f"the class {self.classes.names[self.table[value]]}"
                )
                other = self.classes.names[self.palette.index(tuple(stored.palette[value].tolist()))]
                raise UserError(
                    f"{path}: the value {value} is {name}, but has the colour of {other} in the file's "
                    "palette; read the colours with data.label.colors=true, or the values with data.label.colors=false"
                )

    def _turned(self, ids: Ids, path: Path, size: tuple[int, int], orientation: int) -> Ids:
        """Turn a label that has the image's stored orientation upright."""
        kind = self.form.orientation
        if kind == "auto" and (orientation not in SWAPPED or size[0] == size[1]):
            raise UserError(
                f"{path}: its image has the EXIF orientation {orientation}, and height and width do not say whether "
                "the label is upright too: set data.label.orientation=shown (upright) or stored (turned like the "
                "image's stored pixels)"
            )
        stored = kind == "stored" or (kind == "auto" and ids.shape == size[::-1])
        return turn(ids, orientation) if stored else ids


def _codes(colours: Array) -> Array:
    wide = colours.astype(np.uint32)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


def _whole_numbers(ids: Mapping[int | str, Any] | None) -> set[int]:
    return {key for key in ids or () if isinstance(key, int)}


def _few(values: Sequence[Any], most: int = 8) -> str:
    """The first values of a list."""
    return f"{list(values)[:most]}" + (f" and {len(values) - most} more" if len(values) > most else "")

"""What is read is what a viewer shows, worked out by hand or by OpenCV."""

import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from transkd.data.images import find_images
from transkd.data.reading import read_image, read_oriented, read_size, read_stored, turn
from transkd.errors import UserError

# EXIF: where the first row and the first column of the stored pixels are shown
ROW_AND_COLUMN = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}
SHOWN = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


def stored_as(shown, orientation):
    """The stored pixels that a viewer shows as given, by the definition of the EXIF tag."""
    row, column = ROW_AND_COLUMN[orientation]
    height, width = shown.shape[:2]
    rows = height if row in ("top", "bottom") else width
    columns = width if row in ("top", "bottom") else height
    stored = np.empty((rows, columns, *shown.shape[2:]), shown.dtype)
    for r in range(rows):
        for c in range(columns):
            place = {row: r, column: c}
            y = place["top"] if "top" in place else height - 1 - place["bottom"]
            x = place["left"] if "left" in place else width - 1 - place["right"]
            stored[r, c] = shown[y, x]
    return stored


def save(path, pixels, orientation=None, **settings):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if orientation is not None:
        settings["exif"] = Image.Exif()
        settings["exif"][0x0112] = orientation
    image.save(path, **settings)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_an_orientation_is_applied(tmp_path, orientation, suffix):
    settings = {"lossless": True} if suffix == ".webp" else {}
    path = save(tmp_path / f"image{suffix}", stored_as(SHOWN, orientation), orientation, **settings)
    pixels, read = read_oriented(path)
    assert np.array_equal(pixels, SHOWN)
    assert read == orientation
    assert read_size(path) == ((6, 8), orientation)
    assert np.array_equal(turn(stored_as(SHOWN, orientation), orientation), SHOWN)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_as_opencv_shows_it(tmp_path, orientation):
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8), (40, 24))
    path = save(tmp_path / "image.jpg", stored_as(smooth, orientation), orientation, quality=95)
    shown = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert shown.shape == smooth.shape
    assert np.abs(read_image(path).astype(int) - shown).max() <= 3  # two decoders of chroma
    assert np.abs(read_image(path).astype(int) - smooth).mean() < 6


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_there_is_not_is_none(tmp_path, orientation):
    assert np.array_equal(read_image(save(tmp_path / "image.png", SHOWN, orientation)), SHOWN)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    grey = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)  # value / 257, rounded
    path = str(tmp_path / f"grey{suffix}")
    cv2.imwrite(path, grey)
    assert read_image(path)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert read_image(path).shape == (1, 6, 3)
    colours = np.array([[[0x12FF, 0x8000, 0xFFFF]]], dtype=np.uint16)  # blue, green, red
    path = str(tmp_path / f"colours{suffix}")
    cv2.imwrite(path, colours)
    assert read_image(path).tolist() == [[[0xFF, 0x80, 0x12]]]


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [(np.ones((4, 4), np.float32), "floating-point"), (np.ones((4, 4), np.int32), "32-bit")],
)
def test_values_without_a_range_are_refused(tmp_path, pixels, kind):
    path = save(tmp_path / "image.tif", pixels)
    with pytest.raises(UserError, match=rf"image\.tif has {kind}.* convert it to 8 or 16 bits"):
        read_image(path)


def palette(alpha=None):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    if alpha is not None:
        image.info["transparency"] = bytes(alpha)
    return image


def cmyk():
    image = Image.new("CMYK", (8, 8))
    image.paste((0, 255, 255, 0), (0, 0, 8, 8))
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (Image.new("L", (2, 1), 77), ".png", [[77] * 3] * 2),
        (Image.new("RGBA", (2, 1), (10, 20, 30, 255)), ".png", [[10, 20, 30]] * 2),
        (Image.new("RGBA", (2, 1), (10, 20, 30, 0)), ".png", [[255] * 3] * 2),  # white behind
        (Image.new("RGBA", (2, 1), (0, 0, 0, 102)), ".png", [[153] * 3] * 2),  # 255 · (1 - 102/255)
        (Image.new("LA", (2, 1), (0, 0)), ".png", [[255] * 3] * 2),
        (palette(), ".png", [[10, 20, 30], [200, 100, 0]]),
        (palette(), ".bmp", [[10, 20, 30], [200, 100, 0]]),
        (palette(alpha=[255, 0]), ".png", [[10, 20, 30], [255, 255, 255]]),
        (Image.fromarray(np.array([[False, True]])), ".png", [[0] * 3, [255] * 3]),
        (Image.fromarray(np.array([[False, True]])), ".TIF", [[0] * 3, [255] * 3]),
        (Image.new("RGB", (2, 1), (9, 8, 7)), ".BMP", [[9, 8, 7]] * 2),
        (cmyk(), ".tif", [[255, 0, 0]] * 8),
    ],
)
def test_every_mode_becomes_the_rgb_of_a_viewer(tmp_path, image, suffix, expected):
    path = save(tmp_path / f"image{suffix}", image)
    assert read_image(path)[0].tolist() == expected


def test_a_cmyk_photograph_is_as_opencv_shows_it(tmp_path):
    path = save(tmp_path / "image.jpg", cmyk(), quality=100)
    shown = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert np.abs(read_image(path).astype(int) - shown).max() <= 2
    assert np.abs(read_image(path).astype(int) - (255, 0, 0)).max() <= 2


# Labels


def test_values_of_a_label(tmp_path):
    ids = np.array([[0, 3], [7, 255]], dtype=np.uint8)
    for name, image in {
        "grey.png": Image.fromarray(ids),
        "grey.TIFF": Image.fromarray(ids),
        "rgb.png": Image.fromarray(np.repeat(ids[..., None], 3, axis=2)),
        "rgba.png": Image.fromarray(np.dstack([ids, ids, ids, np.full_like(ids, 255)])),
    }.items():
        assert np.array_equal(read_stored(save(tmp_path / name, image)).values, ids), name
    assert read_stored(save(tmp_path / "wide.png", ids.astype(np.uint16) * 9)).values.tolist() == [[0, 27], [63, 2295]]
    assert read_stored(save(tmp_path / "bits.png", Image.fromarray(ids > 3))).values.tolist() == [[0, 0], [1, 1]]


def test_a_palette_label_has_values_and_colours(tmp_path):
    path = save(tmp_path / "label.png", palette())
    values, colours = read_stored(path)
    assert values.tolist() == [[0, 1]]
    assert colours[:2].tolist() == [[10, 20, 30], [200, 100, 0]]
    assert read_stored(path, colours=True).values.tolist() == [[[10, 20, 30], [200, 100, 0]]]


def test_transparent_pixels_of_a_label_are_black(tmp_path):
    pixels = np.array([[[9, 8, 7, 255], [9, 8, 7, 0]]], dtype=np.uint8)
    assert read_stored(save(tmp_path / "a.png", pixels), colours=True).values.tolist() == [[[9, 8, 7], [0, 0, 0]]]
    pixels[0, 1, 3] = 128
    with pytest.raises(UserError, match=r"b\.png is partly transparent"):
        read_stored(save(tmp_path / "b.png", pixels), colours=True)


def test_a_jpeg_is_no_label(tmp_path):
    path = save(tmp_path / "label.png", SHOWN[..., 0], format="JPEG")
    with pytest.raises(UserError, match=r"label\.png is a JPEG, which changes the values of a label; export labels as"):
        read_stored(path)


# Files that cannot be read


@pytest.mark.parametrize("read", [read_image, read_stored])
def test_files_that_are_none(tmp_path, read):
    empty, loop, folder = tmp_path / "empty.png", tmp_path / "loop.png", tmp_path / "folder.png"
    empty.touch()
    loop.symlink_to(loop)
    folder.mkdir()
    for path, message in (
        (empty, r"cannot read the .*empty\.png: damaged, .*the file is empty, 0 bytes"),
        (loop, r"cannot read the .*loop\.png: the link leads back to itself"),
        (folder, r"folder\.png is a folder, not a regular file"),
        (tmp_path / "none.png", r"not found: .*none\.png"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_no_permission(tmp_path, monkeypatch):
    """As the administrator sees it too, who may read everything."""
    path = save(tmp_path / "image.png", SHOWN)

    def refuse(*args, **settings):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UserError, match=r"cannot read the image .*image\.png: no permission"):
        read_image(path)


# Images to predict


def test_the_images_of_a_folder(tmp_path):
    """Upper-case suffixes, links, no hidden files, no loops."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for path in (
        inside / "a.JPG",
        inside / "sub" / "b.Png",
        outside / "c.webp",
        inside / ".ipynb_checkpoints" / "d.png",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("._a.jpg", "Thumbs.db", ".DS_Store"):
        (inside / name).touch()
    (inside / "link").symlink_to(outside)
    (inside / "sub" / "loop").symlink_to(inside)
    expected = ["a.JPG", "link/c.webp", "sub/b.Png"]
    assert [os.path.relpath(path, inside) for path in find_images(str(inside)).images] == expected
    assert [path.name for path in find_images(f"{inside}/*").images] == ["a.JPG"]
    with pytest.raises(UserError, match="no images for input="):
        find_images(f"{inside}/**/d.png")


# Labels in less or more than 8 bits


def write_png(path, width, bits, kind, row):
    """A PNG of one row by its specification; kind 0 is grey, 2 RGB, 4 grey with alpha."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


@pytest.mark.parametrize(
    ("bits", "row", "values", "shown"),
    [
        (1, b"\x50", [0, 1, 0, 1], [0, 255, 0, 255]),
        (2, b"\x1b", [0, 1, 2, 3], [0, 85, 170, 255]),
        (4, b"\x01\x2f", [0, 1, 2, 15], [0, 17, 34, 255]),
    ],
)
def test_few_bits_are_ids_in_a_label_and_shades_in_an_image(tmp_path, bits, row, values, shown):
    path = write_png(tmp_path / "a.png", 4, bits, 0, row)
    assert read_stored(path).values.tolist() == [values]
    assert read_image(path)[..., 0].tolist() == [shown]


@pytest.mark.parametrize(("kind", "row"), [(2, [5, 5, 5, 300, 300, 300]), (4, [5, 65535, 300, 65535])])
def test_labels_of_16_bits_in_several_channels_are_refused(tmp_path, kind, row):
    """Pillow reads their upper bytes, here 0 and 1."""
    path = write_png(tmp_path / "a.png", 2, 16, kind, struct.pack(f">{len(row)}H", *row))
    with pytest.raises(UserError, match=r"a\.png has 16 bits a channel in several.*one channel, or as RGB of 8"):
        read_stored(path)

"""Zip files for the test servers, by what the servers publish."""

import zipfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from transkd.deploy.archives import check_archive, write_archive
from transkd.errors import UserError

# the rows of cityscapesScripts' helpers/labels.py that are evaluated: (name, id, trainId)
OFFICIAL = [
    ("road", 7, 0),
    ("sidewalk", 8, 1),
    ("building", 11, 2),
    ("wall", 12, 3),
    ("fence", 13, 4),
    ("pole", 17, 5),
    ("traffic light", 19, 6),
    ("traffic sign", 20, 7),
    ("vegetation", 21, 8),
    ("terrain", 22, 9),
    ("sky", 23, 10),
    ("person", 24, 11),
    ("rider", 25, 12),
    ("car", 26, 13),
    ("truck", 27, 14),
    ("bus", 28, 15),
    ("train", 31, 16),
    ("motorcycle", 32, 17),
    ("bicycle", 33, 18),
]
IDS = np.arange(19, dtype=np.uint8).reshape(1, 19)


def predictions(folder, *names):
    found = {}
    for name in names:
        image = folder / name
        ids = folder / "ids" / f"{image.stem}.png"
        ids.parent.mkdir(exist_ok=True)
        Image.fromarray(IDS).save(ids)
        found[image] = ids
    return found


def content(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: np.asarray(Image.open(BytesIO(archive.read(name)))) for name in archive.namelist()}


def test_cityscapes(tmp_path):
    """Label ids, single-channel, a name that begins with city, sequence and frame."""
    found = predictions(tmp_path, "berlin_000000_000019_leftImg8bit.png", "munich_000397_000019_leftImg8bit.png")
    check_archive("cityscapes", 19, list(found))
    said = write_archive("cityscapes", found, tmp_path / "out" / "cityscapes.zip")
    assert "has 2 of the 1525 test images of cityscapes; the server scores all 1525" in said
    written = content(tmp_path / "out" / "cityscapes.zip")
    assert list(written) == ["berlin_000000_000019_pred_labelIds.png", "munich_000397_000019_pred_labelIds.png"]
    for pixels in written.values():
        assert pixels.dtype == np.uint8
        assert pixels.tolist() == [[label_id for _, label_id, _ in OFFICIAL]]


def test_acdc(tmp_path):
    """Train ids under the names of the images."""
    found = predictions(tmp_path, "GOPR0122_frame_000161_rgb_anon.png")
    check_archive("acdc", 19, list(found))
    write_archive("acdc", found, tmp_path / "acdc.zip")
    written = content(tmp_path / "acdc.zip")
    assert list(written) == ["labelTrainIds/GOPR0122_frame_000161_rgb_anon.png"]
    assert np.array_equal(*written.values(), IDS)


def test_the_evaluation_of_cityscapes_finds_them(tmp_path):
    """cityscapesScripts matches <city>_123456_123456*.png for <city>_123456_123456_gtFine_labelIds.png."""
    from fnmatch import filter as matching

    found = predictions(tmp_path, "berlin_000000_000019_leftImg8bit.png", "berlin_000001_000019_leftImg8bit.png")
    write_archive("cityscapes", found, tmp_path / "a.zip")
    names = list(content(tmp_path / "a.zip"))
    assert matching(names, "berlin_000000_000019*.png") == names[:1]


@pytest.mark.parametrize(
    ("kind", "classes", "names", "message"),
    [
        ("cityscapes", 11, [], r"archive=cityscapes needs a network of the 19 Cityscapes classes, this has 11"),
        (
            "cityscapes",
            19,
            ["frame7.png"],
            r"frame7\.png is not named as in the data set; expected berlin_000000_000019",
        ),
        (
            "acdc",
            19,
            ["berlin_000000_000019_leftImg8bit.png"],
            r"is not named as in the data set; expected GOPR0122_fr",
        ),
        ("acdc", 19, ["fog/a_rgb_anon.png", "rain/a_rgb_anon.png"], r"fog.* and .*rain.* would have the same name"),
    ],
)
def test_what_cannot_be_submitted(tmp_path, kind, classes, names, message):
    with pytest.raises(UserError, match=message):
        check_archive(kind, classes, [tmp_path / name for name in names])

import numpy as np
import pytest
from PIL import Image

from transkd.data import CITYSCAPES, SegmentationDataset, find_cityscapes
from transkd.errors import UserError


@pytest.fixture
def root(tmp_path):
    """Three images of two cities, laid out as the archives unpack."""
    rng = np.random.default_rng(0)
    for city, name in (
        ("aachen", "aachen_000000_000019"),
        ("aachen", "aachen_000001_000019"),
        ("ulm", "ulm_000000_000019"),
    ):
        for folder, file, pixels in (
            ("leftImg8bit", f"{name}_leftImg8bit.png", rng.integers(0, 256, (16, 32, 3), dtype=np.uint8)),
            ("gtFine", f"{name}_gtFine_labelTrainIds.png", rng.choice([0, 18, 255], (16, 32)).astype(np.uint8)),
            ("gtFine", f"{name}_gtFine_labelIds.png", np.full((16, 32), 33, dtype=np.uint8)),
            ("gtFine", f"{name}_gtFine_color.png", np.zeros((16, 32, 4), dtype=np.uint8)),
        ):
            path = tmp_path / folder / "train" / city / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path


def test_a_split(root):
    pairs = find_cityscapes(root, "train")
    assert [pair.image.name[:10] for pair in pairs] == ["aachen_000", "aachen_000", "ulm_000000"]
    assert all(pair.label.name.endswith("_labelTrainIds.png") for pair in pairs)
    sample = SegmentationDataset(pairs, CITYSCAPES)[0]
    assert sample.image.shape == (3, 16, 32)
    assert set(sample.target.unique().tolist()) <= {0, 18, 255}


def test_labels_that_were_not_made_yet(root):
    for path in root.rglob("*_labelTrainIds.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"has labelIds, but no labelTrainIds.*csCreateTrainIdLabelImgs"):
        find_cityscapes(root, "train")


def test_one_without_a_partner_is_named(root):
    gone = next(root.rglob("ulm*_labelTrainIds.png"))
    gone.unlink()
    with pytest.raises(UserError, match=r"image without a label: .*ulm_000000_000019_leftImg8bit.png"):
        find_cityscapes(root, "train")


def test_another_folder(tmp_path):
    with pytest.raises(UserError, match=r"data.root=.*expected leftImg8bit/.*gtFine/.*\+experiment=demo"):
        find_cityscapes(tmp_path, "val")

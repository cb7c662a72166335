import importlib

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from transkd.cli import CONF
from transkd.data import NYUV2, NYUV2_39, SegmentationDataset, find_nyuv2, nyuv2, prepare_nyuv2
from transkd.errors import UserError

COUNT, HEIGHT, WIDTH = 5, 12, 16
MAPPED = np.arange(894) % 40 + 1  # label 1 → class 1, …, 40 → 40, 41 → 1


@pytest.fixture
def folder(tmp_path):
    """Images 0001 to 0004, two in each split, a PNG among them."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for i in range(1, 5):
        image = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        image.save(tmp_path / "images" / f"{i:04d}{'.png' if i == 1 else '.jpg'}")
        label = rng.integers(0, 39, (HEIGHT, WIDTH), dtype=np.uint8)
        label[0] = 255
        Image.fromarray(label).save(tmp_path / "labels" / f"{i:04d}.png")
    (tmp_path / "train.txt").write_text("0003\n0001\n")
    (tmp_path / "val.txt").write_text("0002\n0004")
    return tmp_path


@pytest.fixture
def official(tmp_path):
    """The three official files, small: MATLAB's column-major order, so HDF5 has all dimensions reversed."""
    h5py = pytest.importorskip("h5py", reason="needs h5py (transkd[nyuv2])")
    scipy_io = pytest.importorskip("scipy.io", reason="needs scipy (transkd[nyuv2])")
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (COUNT, HEIGHT, WIDTH, 3), dtype=np.uint8)
    labels = rng.integers(0, 895, (COUNT, HEIGHT, WIDTH), dtype=np.uint16)
    labels[:, 0, :3] = [0, 41, 894]
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["labels"] = labels.transpose(0, 2, 1)
    columns = {"trainNdxs": np.array([[2], [5]]), "testNdxs": np.array([[1], [3], [4]])}
    scipy_io.savemat(tmp_path / "splits.mat", columns)
    scipy_io.savemat(tmp_path / "classMapping40.mat", {"mapClass": MAPPED[None].astype(np.uint8)})
    return tmp_path, images, labels


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_split_of_the_folder(folder):
    pairs = find_nyuv2(str(folder), "train")
    assert [pair.image.name for pair in pairs] == ["0003.jpg", "0001.png"]
    assert [pair.label.name for pair in pairs] == ["0003.png", "0001.png"]
    assert len(find_nyuv2(folder, "val")) == 2
    image, label = SegmentationDataset(pairs, NYUV2_39).read(0)
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert (label[0] == 255).all()
    assert label[1:].max() < 39


def test_classes():
    assert NYUV2.names[0] == "wall"
    assert NYUV2.names[38:] == ("otherfurniture", "otherprop")
    assert NYUV2_39.names == NYUV2.names[:39]
    assert NYUV2.palette[33] == (112, 128, 144)  # sink


def test_the_official_files_are_converted(official):
    root, images, labels = official
    prepare_nyuv2(root)
    assert (root / "train.txt").read_text().split() == ["0002", "0005"]
    assert (root / "val.txt").read_text().split() == ["0001", "0003", "0004"]
    dataset = SegmentationDataset(find_nyuv2(root, "val"), NYUV2)
    for k, i in enumerate([0, 2, 3]):
        image, label = dataset.read(k)
        assert np.array_equal(image, images[i])
        expected = np.where(labels[i] == 0, 255, MAPPED[labels[i].astype(int) - 1] - 1)
        assert np.array_equal(label, expected)
        assert label[0, :3].tolist() == [255, 0, 13]  # unlabelled; 41 → 1; 894 → 14
    assert not list(root.rglob(".*"))


def test_a_conversion_goes_on_and_is_made_once(official, monkeypatch):
    root = official[0]
    saved = []

    def interrupted(pixels, path, **settings):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(pixels, path)

    save = nyuv2.save_png
    monkeypatch.setattr(nyuv2, "save_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_nyuv2(root)
    assert not (root / "train.txt").exists()
    with pytest.raises(UserError, match=r"no NYUv2 split train\.txt"):
        find_nyuv2(root, "train")

    monkeypatch.setattr(nyuv2, "save_png", lambda pixels, path, **_: (saved.append(path), save(pixels, path)))
    prepare_nyuv2(root)
    assert len(saved) == len(set(saved)) == 2 * COUNT
    before = files(root)
    prepare_nyuv2(root)
    assert len(saved) == 2 * COUNT
    assert files(root) == before
    assert len(find_nyuv2(root, "train")) == 2


def test_a_converted_folder_needs_no_reader(folder, monkeypatch):
    """Also beside the official file, once the split files are there."""
    (folder / "nyu_depth_v2_labeled.mat").write_bytes(b"")
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    prepare_nyuv2(folder)
    assert len(find_nyuv2(folder, "train")) == 2


def test_the_configuration_prepares(official):
    root = official[0]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = instantiate(compose("train", ["+experiment=nyuv2", f"data.root={root}"]).data)
    data.prepare_data()
    assert (len(data.dataset("train")), len(data.dataset("val"))) == (2, 3)
    assert data.dataset("val")[0].image.shape == (3, 120, 160)


def prepared(root, split):
    prepare_nyuv2(root)
    return find_nyuv2(root, split)


def refused(root, message, split="train"):
    with pytest.raises(UserError, match=message) as caught:
        prepared(root, split)
    assert "\n" not in str(caught.value)


def test_a_missing_split_file(folder):
    (folder / "train.txt").unlink()
    refused(folder, r"no NYUv2 split train\.txt under data\.root=.*train\.txt.*nyu_depth_v2_labeled\.mat")
    refused(folder / "nowhere", r"no NYUv2 split train\.txt under data\.root=.*nowhere")
    refused(folder, r"no NYUv2 split test\.txt", split="test")


def test_a_split_of_files_that_are_not_there(folder):
    (folder / "labels" / "0001.png").unlink()
    (folder / "train.txt").write_text("\ufeff0003\n0001\n0007\n", encoding="utf-8")  # with the mark of some editors
    refused(
        folder, r"train\.txt lists 3 ids; missing are images/0007\.png, labels/0001\.png, labels/0007\.png: expected"
    )
    (folder / "train.txt").write_text("0007\n0008")
    refused(folder, r"lists 2 ids; missing are images/0007\.png, .* and 1 more: expected")
    (folder / "train.txt").write_text("\n")
    refused(folder, r"train\.txt lists no names: expected one a line")


def test_two_images_of_an_id(folder):
    (folder / "images" / "0001.jpg").touch()
    refused(folder, r"two images have the same name, .*0001\.jpg and .*0001\.png; remove one")


@pytest.mark.parametrize("name", ["h5py", "scipy"])
def test_without_a_reader(tmp_path, monkeypatch, name):
    (tmp_path / "nyu_depth_v2_labeled.mat").touch()
    found = importlib.import_module

    def without(module, *args):
        if module.split(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return found(module, *args)

    if name == "scipy":
        pytest.importorskip("h5py", reason="needs h5py (transkd[nyuv2])")
    monkeypatch.setattr(importlib, "import_module", without)
    refused(tmp_path, rf"converting nyu_depth_v2_labeled\.mat needs {name}: pip install 'transkd\[nyuv2\]'")


@pytest.mark.parametrize("name", ["splits.mat", "classMapping40.mat"])
def test_a_missing_or_wrong_file_beside_it(official, name):
    root = official[0]
    content = (root / name).read_bytes()
    (root / name).unlink()
    refused(root, rf"has nyu_depth_v2_labeled\.mat, but no {name}: converting it needs")
    (root / name).write_bytes(b"nothing of the kind")
    refused(root, rf"{name} is not a MATLAB file or is damaged")
    other = {"splits.mat": "classMapping40.mat", "classMapping40.mat": "splits.mat"}[name]
    (root / name).write_bytes((root / other).read_bytes())
    refused(root, rf"{name} has no (trainNdxs, testNdxs|mapClass): is it the official {name}\?")
    (root / name).write_bytes(content)
    prepare_nyuv2(root)


def test_a_wrong_labeled_file(official):
    h5py = pytest.importorskip("h5py")
    root, images, _ = official
    labeled = root / "nyu_depth_v2_labeled.mat"
    labeled.write_bytes(labeled.read_bytes()[:700])
    refused(root, r"nyu_depth_v2_labeled\.mat is not a MATLAB v7\.3 \(HDF5\) file or is damaged")
    for content, got in (
        ({"depths": images}, "images missing, labels missing"),
        ({"images": images, "labels": images[..., 0]}, rf"images \[{COUNT}, {HEIGHT}, {WIDTH}, 3\]"),
        ({"images": images.transpose(0, 3, 2, 1), "labels": images[..., 0]}, "labels"),
    ):
        with h5py.File(labeled, "w") as file:
            for key, value in content.items():
                file[key] = value
        refused(root, rf"is not the labelled data set of NYUv2: expected images \[N, 3, W, H\].*got.*{got}")


def test_numbers_out_of_range(official):
    h5py, scipy_io = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")
    root = official[0]
    scipy_io.savemat(root / "splits.mat", {"trainNdxs": [[1]], "testNdxs": [[6]]})
    refused(root, rf"splits\.mat has the index 6, but nyu_depth_v2_labeled\.mat has {COUNT} images")
    scipy_io.savemat(root / "splits.mat", {"trainNdxs": [[1]], "testNdxs": [[2]]})
    scipy_io.savemat(root / "classMapping40.mat", {"mapClass": np.arange(894)[None]})
    refused(root, r"mapClass must map 894 labels to 1…40")
    scipy_io.savemat(root / "classMapping40.mat", {"mapClass": MAPPED[None]})
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "r+") as file:
        file["labels"][0, 0, 0] = 895
    refused(root, r"image 1 has the label 895, expected 0…894")

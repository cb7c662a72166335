"""Data sets of one's own by configuration alone: folders, globs, split files."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from documents import text, write_files
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from small_data import write_pair
from test_reading import save

from transkd.arguments import check_arguments
from transkd.cli import CONF
from transkd.data import CITYSCAPES, VOC, ClassSet, Pair, find_folder, own_classes
from transkd.data.labels import LabelReader
from transkd.data.listing import by_stem, elsewhere, find_files, matching, named
from transkd.errors import UserError

RNG = np.random.default_rng(0)


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names(pairs, root):
    return [(str(pair.image.relative_to(root)), str(pair.label.relative_to(root))) for pair in pairs]


# Patterns


def test_folders(tmp_path):
    make(tmp_path, "images/train/b.JPG", "images/train/x/a.png", "labels/train/b.png", "labels/train/x/a.TIF")
    make(tmp_path, "images/val/c.webp", "labels/val/c.bmp", "images/train/notes.txt", "images/train/Thumbs.db")
    make(tmp_path, "images/train/._b.JPG", "labels/train/.ipynb_checkpoints/b.png")
    assert names(find_folder(tmp_path, "train"), tmp_path) == [
        ("images/train/b.JPG", "labels/train/b.png"),
        ("images/train/x/a.png", "labels/train/x/a.TIF"),
    ]
    assert names(find_folder(str(tmp_path), "val"), tmp_path) == [("images/val/c.webp", "labels/val/c.bmp")]


def test_globs_pair_by_what_the_wildcards_stand_for(tmp_path):
    make(tmp_path, "all/a.jpg", "all/b.jpg", "all/a_mask.png", "all/b_mask.PNG", "all/a_mask_old.png")
    assert names(find_folder(tmp_path, "train", "all/*.jpg", "all/*_mask.png"), tmp_path) == [
        ("all/a.jpg", "all/a_mask.png"),
        ("all/b.jpg", "all/b_mask.PNG"),
    ]
    make(
        tmp_path,
        "rgb/train/ulm/f1_img.png",
        "gt/train/ulm/f1_gt.png",
        "rgb/train/bonn/f1_img.png",
        "gt/train/bonn/f1_gt.png",
    )
    found = find_folder(tmp_path, "train", "rgb/{split}/**/*_img.*", "gt/{split}/*/*_gt.png")
    assert [pair.image.parent.name for pair in found] == [pair.label.parent.name for pair in found] == ["bonn", "ulm"]
    by_split = {"train": "all/*.jpg", "val": "rgb/train/*/*.png"}
    assert len(find_folder(tmp_path, "train", by_split, "all/*_mask.png")) == 2
    with pytest.raises(UserError, match=r"data\.find\.images has no entry test; it has train, val"):
        find_folder(tmp_path, "test", by_split, "all/*_mask.png")


def test_a_pattern_outside_the_root(tmp_path):
    make(tmp_path, "here/x", "there/a.png", "masks/a.png")
    images = str(tmp_path / "there" / "*.png")
    assert find_folder(tmp_path / "here", "train", images, "../masks") == [
        Pair(tmp_path / "there" / "a.png", tmp_path / "here" / ".." / "masks" / "a.png")
    ]


def test_what_wildcards_stand_for(tmp_path):
    make(tmp_path, "a/1[x].png", "a/b/2.png", "c.d/3.jpeg")
    assert sorted(matching(tmp_path, "a/**/*")) == ["1[x]", "b/2"]
    assert sorted(matching(tmp_path, "a/?[x].png")) == ["1"]
    assert sorted(matching(tmp_path, "**/*.jpeg")) == ["c.d/3"]
    assert sorted(matching(tmp_path, "c.d")) == sorted(matching(tmp_path, "c.d/")) == ["3"]
    assert matching(tmp_path, "nowhere/*.png") == {}
    make(tmp_path, "a/b/2.jpg")
    with pytest.raises(UserError, match=r"two files have the same name, .*2\.jpg and .*2\.png; remove one"):
        matching(tmp_path, "a")


def test_names_are_compared_in_normal_form(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Mün–1") for form in ("NFC", "NFD"))
    assert composed != decomposed
    make(tmp_path, f"images/train/{decomposed}.png", f"labels/train/{composed}.png", "train.txt")
    assert len(find_folder(tmp_path, "train")) == 1
    for line in (composed, f"{composed}.png", f"{decomposed}.png"):
        (tmp_path / "train.txt").write_text(f"{line}\n", encoding="utf-8")
        assert len(find_folder(tmp_path, "train", index="{split}.txt")) == 1
    with pytest.raises(UserError, match="two images have the same name"):
        by_stem([Path(f"{composed}.png"), Path(f"{decomposed}.png")])
    assert named(decomposed) == composed


def test_links_are_followed_without_loops(tmp_path):
    make(tmp_path, "real/a.png", "root/sub/b.png")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "root" / "twin").symlink_to(tmp_path / "real")
    (tmp_path / "root" / "sub" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "self").symlink_to(tmp_path / "root" / "self")
    found = find_files(tmp_path / "root")
    assert [str(path.relative_to(tmp_path / "root")) for path in found] == ["link/a.png", "sub/b.png", "twin/a.png"]
    for root, why in (("root/self", "a link to itself or to nothing"), ("real/a.png", "a file"), ("none", "not there")):
        with pytest.raises(UserError, match=rf"no images under data\.root=.*; {tmp_path}/{root} is {why}$"):
            find_folder(tmp_path / root, "train")


# Split files


@pytest.mark.parametrize(
    "lines", ["b\na\n", "b.jpg\n\n# none\na.jpg", "\ufeffb\r\na\r\n", "all/b.jpg all/b_m.png\nall/a.jpg,all/a_m.png"]
)
def test_a_split_file_chooses(tmp_path, lines):
    make(tmp_path, "all/a.jpg", "all/b.jpg", "all/c.jpg", "all/a_m.png", "all/b_m.png", "all/c_m.png")
    (tmp_path / "train.txt").write_text(lines, encoding="utf-8")
    found = find_folder(tmp_path, "train", "all/*.jpg", "all/*_m.png", "{split}.txt")
    assert [pair.image.name for pair in found] == ["b.jpg", "a.jpg"]
    assert [pair.label.name for pair in found] == ["b_m.png", "a_m.png"]


def test_a_name_with_a_space(tmp_path):
    make(tmp_path, "images/train/my car.png", "labels/train/my car.png")
    (tmp_path / "train.txt").write_text("my car.png\n")
    assert len(find_folder(tmp_path, "train", index="{split}.txt")) == 1


@pytest.mark.parametrize("separator", ["\t", ","])
def test_two_files_with_spaces_in_their_names(tmp_path, separator):
    decomposed = unicodedata.normalize("NFD", "mein Gerät.jpg")
    make(tmp_path, f"all/{decomposed}", "all/m 1.png", "all/other.png")
    (tmp_path / "train.txt").write_text(f"all/mein Gerät.jpg{separator}all/m 1.png\n", encoding="utf-8")
    found = find_folder(tmp_path, "train", "all/*.jpg", "all/*.png", "{split}.txt")
    assert names(found, tmp_path) == [(f"all/{decomposed}", "all/m 1.png")]


def test_a_split_file_names_what_is_not_there(tmp_path):
    make(tmp_path, "images/train/a.jpg", "images/train/d.jpg", "labels/train/a.png")
    (tmp_path / "train.txt").write_text("a\nb\nc.jpg\nd\ne\n")
    with pytest.raises(
        UserError, match=r"lists 5 names, of which 4 are not there: b, c\.jpg, d \(its label\) and 1 more; exp"
    ) as caught:
        find_folder(tmp_path, "train", index="{split}.txt")
    assert "\n" not in str(caught.value)
    (tmp_path / "train.txt").write_text("\n")
    with pytest.raises(UserError, match=r"train\.txt lists no names"):
        find_folder(tmp_path, "train", index="{split}.txt")
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read .*train\.txt, the split file of data\.find\.index"):
        find_folder(tmp_path, "train", index="{split}.txt")
    with pytest.raises(UserError, match=r"cannot read .*none\.txt"):
        find_folder(tmp_path, "train", index="none.txt")


# Roots


def test_a_root_above_or_below_is_named(tmp_path):
    right = make(tmp_path / "sets" / "mine", "images/train/a.png", "labels/train/a.png")
    for wrong, where in (
        (right / "images", "above"),
        (right / "images" / "train", "above"),
        (tmp_path / "sets", "below"),
        (tmp_path, "below"),
    ):
        with pytest.raises(
            UserError, match=rf"no images under data\.root={wrong}: .*{where} it, .*data\.root={right}$"
        ):
            find_folder(wrong, "train")
    assert elsewhere(right, "nothing") == ""
    with pytest.raises(
        UserError,
        match=r"expected images in images/val and labels in labels/val; data\.find\.images and .* say where they are$",
    ):
        find_folder(right, "val")


def test_images_without_labels(tmp_path):
    make(tmp_path, "images/train/a.png", "images/train/b.png", "labels/train/a.png")
    with pytest.raises(UserError, match=r"image without a label: .*b\.png"):
        find_folder(tmp_path, "train")


# Classes


def test_classes_of_ones_own():
    assert own_classes(["a", "b"], [[1, 2, 3], [4, 5, 6]]) == ClassSet(("a", "b"), ((1, 2, 3), (4, 5, 6)))
    chosen = own_classes([str(i) for i in range(254)]).palette
    assert len(set(chosen)) == 254
    assert chosen[0] == (242, 24, 24)  # hue 0, saturation 0.9, value 0.95: 0.95 and twice 0.095 of 255
    assert set(chosen).isdisjoint([*VOC.palette, *CITYSCAPES.palette, (0, 0, 0)])


def test_classes_of_ones_own_are_checked():
    with pytest.raises(UserError, match=r"palette has \[1, 2\]: expected \[r,g,b\]"):  # by class_set
        own_classes(["a", "b"], [[1, 2], [3, 4, 5]])


# The configuration


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["data=folder", "run_dir=run", "data.num_workers=0", *overrides])
    check_arguments(cfg)
    return instantiate(cfg.data)


def test_a_set_by_configuration_alone(tmp_path):
    for split in ("train", "val"):
        write_pair(tmp_path / "all" / f"{split}0.jpg", tmp_path / "all" / f"{split}0_mask.png", [0, 7, 8, 26, 255], RNG)
        (tmp_path / f"{split}.txt").write_text(f"{split}0\n")
    data = composed(
        f"data.root={tmp_path}",
        "data.find.images='all/*.jpg'",
        "data.find.labels='all/*_mask.png'",
        "data.find.index='{split}.txt'",
        "data.classes.names=[road,car]",
        "data.num_classes=2",
        "data.label.ids={7:road,8:road,26:car,0:null}",
    )
    assert data.classes == own_classes(["road", "car"])
    image, label = data.dataset("val").read(0)
    assert image.shape == (24, 32, 3)
    assert set(np.unique(label)) == {0, 1, 255}
    assert data.dataset("train")[0].image.shape == (3, 512, 512)


@pytest.mark.parametrize("name", ["yard", "street", "parcels", "plates"])
def test_the_sets_of_the_guide(tmp_path, name):
    write_files(text("guide"), tmp_path)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"hydra.searchpath=[file://{tmp_path / 'my'}]", f"data={name}", "run_dir=run"])
    check_arguments(cfg)
    data = instantiate(cfg.data)
    assert data.find.func.__name__ == {"parcels": "find_coco", "plates": "find_yolo"}.get(name, "find_folder")
    LabelReader(data.classes, data.void, data.label)  # knows the classes that the map names
    with pytest.raises(UserError, match=rf"under data\.root={data.root}: expected"):
        data.dataset("train")


def test_fewer_images_than_a_batch(tmp_path):
    make(tmp_path, "images/train/a.png", "labels/train/a.png")
    data = composed(f"data.root={tmp_path}", "data.classes.names=[a,b]", "data.num_classes=2")
    with pytest.raises(
        UserError, match=r"data\.batch_size=8 on 1 device\(s\) is more than the 1 training images; lower it"
    ):
        data.check_batch_size()


def test_upper_case_suffixes_are_read(tmp_path):
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train").mkdir(parents=True)
    ids = np.array([[0, 1]], dtype=np.uint8)
    for i, (image, label) in enumerate([(".TIF", ".PNG"), (".webp", ".tiff"), (".BMP", ".Bmp"), (".PNG", ".webp")]):
        save(tmp_path / "images" / "train" / f"{i}{image}", np.full((1, 2, 3), 50 * i, np.uint8), lossless=True)
        save(
            tmp_path / "labels" / "train" / f"{i}{label}",
            ids if label != ".webp" else np.dstack([ids] * 3),
            lossless=True,
        )
    dataset = composed(f"data.root={tmp_path}", "data.classes.names=[a,b]", "data.num_classes=2").dataset("train")
    assert len(dataset) == 4
    for i in range(4):
        image, label = dataset.read(i)
        assert (image == 50 * i).all()
        assert label.tolist() == [[0, 1]]

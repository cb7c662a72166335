"""The drawn road scenes: what is drawn, and how the set is laid down on disk."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from transkd.data import synthetic
from transkd.data.classes import CITYSCAPES, CLASS_SETS
from transkd.data.synthetic import CONDITIONS, draw_scene, write_road_scenes
from transkd.errors import UserError

Array = npt.NDArray[np.uint8]
SMALL = {"train": 4, "val": 1, "height": 32, "width": 64}


def draw(condition: str, *seed: int, size: tuple[int, int] = (96, 192)) -> tuple[Array, Array]:
    return draw_scene(np.random.default_rng(seed), *size, condition)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[tuple[Array, Array]]]:
    """The same eight streets in every condition."""
    return {condition: [draw(condition, seed) for seed in range(8)] for condition in CONDITIONS}


def test_class_sets_are_complete():
    assert {name: len(classes.names) for name, classes in CLASS_SETS.items()} == {
        "cityscapes": 19,
        "camvid": 11,
        "voc": 21,
        "nyuv2": 40,
        "nyuv2_39": 39,
        "ade20k": 150,
    }
    for name, classes in CLASS_SETS.items():
        assert len(set(classes.names)) == len(classes.names)
        assert len(set(classes.palette)) == len(classes.names) - (name == "ade20k")  # which has one colour twice
        assert len(classes.palette) == len(classes.names)
    assert CITYSCAPES.names[11] == "person"
    assert CITYSCAPES.palette[11] == (220, 20, 60)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_same_seed_same_bytes_and_other_seed_other_scene(condition):
    (image, label), (again, label_again) = draw(condition, 3), draw(condition, 3)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    other, other_label = draw(condition, 4)
    assert (other != image).any()
    assert (other_label != label).any()


def test_condition_changes_the_picture_and_never_the_street(scenes):
    for street in zip(*scenes.values(), strict=True):
        for image, label in street[1:]:
            np.testing.assert_array_equal(label, street[0][1])
            assert (image != street[0][0]).any()


@pytest.mark.parametrize(
    ("condition", "size"),
    [("fog", (32, 32)), ("night", (33, 47)), ("rain", (97, 191)), ("snow", (64, 256)), ("rain", (120, 60))],
)
def test_sizes_and_types(condition, size):
    image, label = draw(condition, 1, size=size)
    assert image.shape == (*size, 3)
    assert label.shape == size
    assert image.dtype == label.dtype == np.uint8


def test_every_class_occurs_in_many_scenes_and_nothing_else(scenes):
    labels = [label for _, label in scenes["fog"]] + [draw("fog", seed, 1)[1] for seed in range(12)]
    seen = np.stack([np.bincount(label.ravel(), minlength=256) for label in labels]) > 10
    for index, name in enumerate(CITYSCAPES.names):
        assert seen[:, index].mean() >= 0.25, name
    assert not seen[:, 19:255].any()
    assert 0.2 < seen[:, 255].mean() < 1


def test_the_street_is_where_a_street_is(scenes):
    label = np.stack([label for _, label in scenes["fog"]])
    road, sky = (label == CITYSCAPES.names.index(name) for name in ("road", "sky"))
    assert road[:, 70:80].mean() > 0.6
    assert not road[:, :36].any()
    assert sky[:, :10].mean() > 0.15
    assert not sky[:, 60:].any()


def test_conditions_look_as_they_should(scenes):
    grey = {c: np.stack([image for image, _ in drawn]).mean(-1) for c, drawn in scenes.items()}
    labels = np.stack([label for _, label in scenes["fog"]])
    brightness = {condition: values.mean() for condition, values in grey.items()}
    assert brightness["night"] < 0.65 * min(brightness[c] for c in ("fog", "rain", "snow"))
    assert brightness["rain"] < brightness["fog"] < brightness["snow"]
    middle = slice(30, 55)  # the rows of what is far away
    assert grey["fog"][:, middle].std() < 0.8 * grey["snow"][:, middle].std()
    terrain = labels == CITYSCAPES.names.index("terrain")
    assert grey["snow"][terrain].mean() > 1.5 * grey["fog"][terrain].mean()


def test_labels_lie_on_what_is_drawn(scenes):
    """Sky is smooth and leaves are rough, so a shifted label map would show."""
    vegetation, sky = (CITYSCAPES.names.index(name) for name in ("vegetation", "sky"))
    for image, label in scenes["fog"]:
        step = np.abs(np.diff(image.mean(-1), axis=1))
        same = label[:, 1:] == label[:, :-1]
        assert step[same & (label[:, 1:] == sky)].mean() < step[same & (label[:, 1:] == vegetation)].mean()
        assert step[same].mean() < step[~same].mean()


def test_unknown_condition_is_refused():
    with pytest.raises(UserError, match="fog, night, rain, snow; got 'hail'"):
        draw("hail", 0)


def test_layout_is_acdcs(tmp_path):
    root = write_road_scenes(tmp_path / "drawn", **SMALL)
    assert root == tmp_path / "drawn"
    images = sorted((root / "rgb_anon").rglob("*.png"))
    assert len(images) == len(list((root / "gt").rglob("*.png"))) == 5
    for image in images:
        condition, split, sequence, name = image.relative_to(root / "rgb_anon").parts
        assert name.startswith(f"{sequence}_frame_")
        label = root / "gt" / condition / split / sequence / name.replace("_rgb_anon", "_gt_labelTrainIds")
        assert Image.open(image).size == Image.open(label).size == (64, 32)
        assert Image.open(image).mode == "RGB"
        assert Image.open(label).mode == "L"
    for condition in CONDITIONS:
        assert len(list((root / "rgb_anon" / condition / "train").rglob("*.png"))) == 1
    assert (root / "rgb_anon" / "fog" / "val" / "DRAWN0002" / "DRAWN0002_frame_000000_rgb_anon.png").is_file()


def test_each_picture_depends_on_its_index_alone(tmp_path):
    few = contents(write_road_scenes(tmp_path / "few", **{**SMALL, "train": 2}))
    more = contents(write_road_scenes(tmp_path / "more", **SMALL))
    other = contents(write_road_scenes(tmp_path / "other", **{**SMALL, "train": 2}, seed=1))
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 6
    assert all(few[name] == more[name] for name in pictures)
    assert all(other[name] != more[name] for name in pictures)
    train, val = (next(p for n, p in more.items() if f"rgb_anon/fog/{s}" in n) for s in ("train", "val"))
    assert train != val


def test_second_call_touches_nothing(tmp_path, monkeypatch):
    root = write_road_scenes(tmp_path / "drawn", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr(synthetic, "draw_scene", None)
    write_road_scenes(root, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["drawn"]


def test_other_settings_are_refused_by_name(tmp_path):
    root = write_road_scenes(tmp_path / "drawn", **SMALL)
    before = contents(root)
    with pytest.raises(UserError, match=r"train=4.*seed=0.*train=4.*seed=5.*another folder or delete"):
        write_road_scenes(root, **SMALL, seed=5)
    assert contents(root) == before


@pytest.mark.parametrize("name", ["notes.txt", "drawn.json"])
def test_foreign_folder_is_never_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="another folder"):
        write_road_scenes(tmp_path, **SMALL)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "drawn").write_text("mine")
    with pytest.raises(UserError):
        write_road_scenes(tmp_path / "drawn", **SMALL)


def test_empty_and_nested_folders_are_free_places(tmp_path):
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "new" / "deep"):
        assert json.loads((write_road_scenes(root, **SMALL) / "drawn.json").read_text())["train"] == 4


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    whole, calls = synthetic.draw_scene, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(synthetic, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_road_scenes(tmp_path / "drawn", **SMALL)
    assert list(tmp_path.iterdir()) == []
    write_road_scenes(tmp_path / "drawn", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["drawn"]


def test_two_processes_may_draw_the_same_set(tmp_path, monkeypatch):
    """The one that comes second finds the finished set and keeps it."""
    root, place, first = tmp_path / "drawn", synthetic._move_into_place, []

    def overtaken(*arguments):
        if not first:
            first.append(True)
            write_road_scenes(root, **SMALL)
        place(*arguments)

    monkeypatch.setattr(synthetic, "_move_into_place", overtaken)
    write_road_scenes(root, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["drawn"]
    assert (root / "drawn.json").is_file()


@pytest.mark.parametrize("wrong", [{"train": -1}, {"height": 8}, {"width": 0}, {"seed": -1}])
def test_impossible_settings_are_refused(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=name):
        write_road_scenes(tmp_path / "drawn", **{**SMALL, **wrong})

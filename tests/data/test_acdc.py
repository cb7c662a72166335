import shutil

import pytest

from transkd.data import find_acdc
from transkd.errors import UserError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(("split", "count"), [("train", 16), ("val", 12)])
def test_every_condition_is_found(acdc_root, split, count):
    pairs = find_acdc(acdc_root, split)
    assert len(pairs) == len(set(pairs)) == count
    assert {pair.image.parts[-4] for pair in pairs} == {"fog", "night", "rain", "snow"}
    for image, label in pairs:
        inside = image.relative_to(acdc_root / "rgb_anon")
        name = image.name.replace("_rgb_anon", "_gt_labelTrainIds")
        assert label == acdc_root / "gt" / inside.with_name(name)


def test_chosen_conditions(acdc_root):
    pairs = find_acdc(str(acdc_root), "val", conditions=["night", "snow"])
    assert [pair.image.parts[-4] for pair in pairs] == ["night"] * 3 + ["snow"] * 3


def test_pairs_by_name_where_the_orders_differ(tmp_path):
    names = ("x", "x_h")  # x_h_rgb… < x_rgb…, but x_gt… < x_h_gt…
    touch(tmp_path, *(f"rgb_anon/fog/val/s/{name}_rgb_anon.png" for name in names))
    touch(tmp_path, *(f"gt/fog/val/s/{name}_gt_labelTrainIds.png" for name in names))
    images, labels = (sorted(path.name for path in (tmp_path / f).rglob("*.png")) for f in ("rgb_anon", "gt"))
    assert images[0].startswith("x_h")
    assert not labels[0].startswith("x_h")
    found = {pair.image.name: pair.label.name for pair in find_acdc(tmp_path, "val")}
    assert found == {f"{name}_rgb_anon.png": f"{name}_gt_labelTrainIds.png" for name in names}


def test_equal_names_in_two_sequences_and_conditions_stay_apart(tmp_path):
    for place in ("fog/val/a", "fog/val/b", "rain/val/a"):
        touch(tmp_path, f"rgb_anon/{place}/1_rgb_anon.png", f"gt/{place}/1_gt_labelTrainIds.png")
    pairs = find_acdc(tmp_path, "val")
    assert len(pairs) == 3
    assert all(pair.image.parts[-4:-1] == pair.label.parts[-4:-1] for pair in pairs)


def test_other_files_are_left(acdc_root):
    expected = find_acdc(acdc_root, "val")
    touch(acdc_root, "gt/fog/val/GOPR0000/GOPR0000_frame_000000_gt_labelColor.png")
    touch(acdc_root, "rgb_anon/fog/val_ref/GOPR0000/GOPR0000_frame_000000_rgb_ref_anon.png", "rgb_anon/readme.txt")
    assert find_acdc(acdc_root, "val") == expected


def test_every_one_without_a_partner_is_named(acdc_root):
    pairs = find_acdc(acdc_root, "val")
    alone = [pairs[0].label, pairs[4].image]
    pairs[0].image.unlink()
    pairs[4].label.unlink()
    with pytest.raises(UserError, match="images and labels must come in pairs") as caught:
        find_acdc(acdc_root, "val")
    assert f"label without an image: {alone[0]}" in str(caught.value)
    assert f"image without a label: {alone[1]}" in str(caught.value)


@pytest.mark.parametrize("root", ["nowhere", "."])
def test_a_folder_of_something_else_says_the_layout_and_the_way_out(tmp_path, root):
    with pytest.raises(UserError, match=r"data\.root=.*rgb_anon/<fog\|night\|rain\|snow>.*\+experiment=demo") as caught:
        find_acdc(tmp_path / root, "train")
    assert str(tmp_path / root) in str(caught.value)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["fog", "nigth"], r"conditions=\[fog,nigth\]: there is no condition nigth; did you mean night\?"),
        (["snow", "rain", "snow"], r"conditions=\[snow,rain,snow\]: snow is named twice"),
        ([], "expected at least one of fog, night, rain, snow"),
    ],
)
def test_conditions_that_would_drop_or_repeat_images(acdc_root, conditions, message):
    with pytest.raises(UserError, match=message):
        find_acdc(acdc_root, "train", conditions)


def test_a_condition_without_images_is_said(acdc_root, caplog):
    for folder in ("rgb_anon", "gt"):
        shutil.rmtree(acdc_root / folder / "snow")
    assert len(find_acdc(acdc_root, "val", ["fog", "snow"])) == 3
    assert "has no val images of snow; they are left out" in caplog.text

"""Prediction: which images are found, tiles, and that every image is done or named."""

import errno
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from transkd import predict
from transkd.data.geometry import ImageTransform
from transkd.data.images import find_images
from transkd.data.reading import read_image
from transkd.deploy import predicting, tiling
from transkd.deploy.predicting import choose_device, segment
from transkd.errors import UserError
from transkd.models import create_segmenter, save_segmenter
from transkd.models.segmenter import Segmenter

TINY = {"encoder": {"channels": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "heads": [1, 2, 3, 4]}, "width": 16}


def draw(path, height=40, width=56):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    save_segmenter(create_segmenter("segformer_b0", 5, **TINY), path)
    return path


@pytest.fixture
def call(tmp_path, monkeypatch, weights):
    """Call the command in ``tmp_path``; gives the error message, or None where it succeeds."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(sys, "argv", ["transkd", f"weights={weights}", *map(str, arguments)])
        try:
            predict.main()
        except SystemExit as stop:
            message = str(stop.code)
        else:
            return None
        assert "\n" not in message
        return message

    return call


def written(folder, kind="ids"):
    return sorted(path.relative_to(folder / kind).as_posix() for path in (folder / kind).rglob("*"))


def names(found):
    return [path.relative_to(found.base).as_posix() for path in found.images]


# Which images


def test_links_to_folders_are_followed_once(tmp_path):
    draw(tmp_path / "in" / "a.png")
    draw(tmp_path / "in" / "deep" / "b.png")
    draw(tmp_path / "other" / "c.png")
    (tmp_path / "in" / "deep" / "up").symlink_to(tmp_path / "in")  # a loop
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "deep")
    (tmp_path / "in" / "far").symlink_to(tmp_path / "other")
    assert names(find_images(str(tmp_path / "in"))) == ["a.png", "deep/b.png", "far/c.png"]
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert names(find_images(str(tmp_path / "link"))) == ["a.png", "deep/b.png", "far/c.png"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("?.png", ["1.png", "2.png"]),
        ("[12].png", ["1.png", "2.png"]),
        ("[!1].png", ["2.png"]),
        ("[1].png", ["[1].png"]),  # the name that exists
        ("what?.png", ["what?.png"]),
        ("*/x.png", ["one/x.png"]),
        ("**/x.png", ["one/two/x.png", "one/x.png"]),
        ("o?e/**/*.png", ["one/two/x.png", "one/x.png"]),
        ("f[1]/*.png", ["y.png"]),  # the folder that exists
    ],
)
def test_globs(tmp_path, pattern, found):
    for name in ("1.png", "2.png", "[1].png", "what?.png", "one/x.png", "one/two/x.png", "f[1]/y.png"):
        draw(tmp_path / name)
    assert names(find_images(str(tmp_path / pattern))) == found


@pytest.mark.parametrize("pattern", ["nowhere", "*.jpg", "nowhere/*.png", "**/z?.png", "a" * 5000, "nul\0l"])
def test_no_images(tmp_path, pattern):
    draw(tmp_path / "a.png")
    with pytest.raises(UserError, match="no images for input="):
        find_images(str(tmp_path / pattern))


def test_its_own_output_is_no_input(call, tmp_path, capsys):
    draw(tmp_path / "a.png")
    assert call("input=.", "output=first") is None
    assert call("input=.", "output=second") is None
    assert "not searched: first/ids, written by predict" in capsys.readouterr().out
    assert call("input=.", "output=.") is None
    assert call("input=.", "output=.") is None
    assert [written(tmp_path / folder) for folder in ("first", "second", ".")] == [["a.png"]] * 3
    assert call("input=first/colour", "output=third") is None  # asked for by name


def test_an_input_is_not_overwritten(call, tmp_path):
    draw(tmp_path / "x" / "ids" / "a.png")
    before = (tmp_path / "x" / "ids" / "a.png").read_bytes()
    assert "would overwrite x/ids/a.png, an image of input=x/ids" in call("input=x/ids", "output=x")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert "would overwrite" in call("input=x/ids/a.png", "output=link")
    assert (tmp_path / "x" / "ids" / "a.png").read_bytes() == before
    assert list((tmp_path / "x").iterdir()) == [tmp_path / "x" / "ids"]


# Every image is done or named


def test_every_file_is_done_or_named(call, tmp_path, capsys):
    folder = tmp_path / "in"
    draw(folder / "good.png")
    draw(folder / "one.png", 1, 1)
    for mode in ("1", "L", "LA", "P", "CMYK", "RGBA"):
        Image.new(mode, (40, 40)).save(folder / f"mode_{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(folder / "deep.png")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    (folder / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n")
    whole = (folder / "good.png").read_bytes()
    for i, length in enumerate(np.random.default_rng(16).integers(9, len(whole) - 20, 4)):
        (folder / f"cut{i}.png").write_bytes(whole[:length])
    os.mkfifo(folder / "pipe.png")
    (folder / "nowhere.png").symlink_to(folder / "missing")
    (folder / "folder.png").mkdir()
    message = call("input=in", "output=out")
    bad = ["one", "empty", "text", "program", "cut0", "cut1", "cut2", "cut3", "pipe", "nowhere"]
    assert [name for name in bad if f"in/{name}.png" not in message] == []
    assert written(tmp_path / "out") == sorted(
        ["deep.png", "good.png", *(f"mode_{m}.png" for m in ("1", "L", "LA", "P", "CMYK", "RGBA"))]
    )
    assert "8 of 18 images segmented" in capsys.readouterr().out


def test_a_failure_in_the_network_is_of_one_image(call, tmp_path, monkeypatch):
    draw(tmp_path / "in" / "a.png")
    draw(tmp_path / "in" / "b.png")
    right = predicting.segment
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return right(*arguments)

    monkeypatch.setattr(predicting, "segment", failing)
    assert "in/a.png: not enough memory; set a smaller tile, such as tile=512" in call("input=in", "output=out")
    assert written(tmp_path / "out") == ["b.png"]


def test_a_full_disk_leaves_no_truncated_image(call, tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        draw(tmp_path / "in" / f"{name}.png")
    replace, count = os.replace, []

    def full(source, target):
        count.append(target)
        if len(count) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    message = call("input=in", "output=out")
    assert "cannot write out/colour/b.png: No space left on device" in message
    assert "stopped at in/b.png" in message
    assert [path.name for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()] == ["a.png"] * 2 + [
        "b.png",
        "a.png",
    ]


def test_infinite_logits_are_named(call, tmp_path, weights, monkeypatch):
    draw(tmp_path / "a.png")
    broken = predicting.load_network

    def load(*arguments):
        network, card = broken(*arguments)
        network.head.linear_pred.weight.data.fill_(torch.inf)
        return network, card

    monkeypatch.setattr(predicting, "load_network", load)
    assert "a.png: the network's logits are not finite" in call("input=a.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["device=cuda:77"], "device=cuda:77 cannot be used"),
        (["device=toaster"], "device=toaster cannot be used"),
        (["device=meta"], "device=meta cannot be used"),
        (["opacity=5"], "opacity=5: expected a number from 0 to 1"),
        (["tile=5"], "tile=5: expected auto or a whole number of at least 128 or null"),
        (["output=a.png"], "cannot write into output=a.png: a.png is not a folder"),
        (["output=a.png/deeper"], "a.png is not a folder"),
        (["network.width=8"], "network.width needs network.name"),
    ],
)
def test_a_mistake_is_one_line(call, tmp_path, arguments, message):
    draw(tmp_path / "a.png")
    assert message in call("input=a.png", *arguments)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


def test_an_output_that_cannot_be_written(call, tmp_path, monkeypatch):
    draw(tmp_path / "a.png")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot write into output=out: . is not writable" in call("input=a.png", "output=out")


def test_an_image_of_too_many_pixels(tmp_path, monkeypatch):
    draw(tmp_path / "a.png")
    monkeypatch.setattr("transkd.data.reading.MOST_PIXELS", 40 * 56 - 1)
    with pytest.raises(UserError, match=r"a.png has more than 0 megapixels; cut it into parts"):
        read_image(tmp_path / "a.png")


def test_a_resize_to_too_many_pixels(call, tmp_path, weights, monkeypatch):
    """A line of 1×20000 pixels with its shorter side at 512."""
    draw(tmp_path / "line.png", 1, 20_000)
    monkeypatch.setattr(predicting, "resize_steps", lambda _: [("SmallestMaxSize", {"max_size": 512})])
    load = predicting.load_network
    monkeypatch.setattr(predicting, "load_network", lambda *a: (load(*a)[0], {"eval_transform": 1, "num_classes": 5}))
    monkeypatch.setattr(predicting, "MOST_PIXELS", 10**9)
    assert "line.png would have 512×10240000 pixels at the size of validation" in call("input=line.png")


def test_cpu_and_auto_are_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


# Tiles


class Local(nn.Module):
    """Four stages at strides 4, 8, 16, 32 that see 46 pixels to each side: convolutions alone."""

    channels = (6, 6, 6, 6)

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(6 if i else 3, 6, 3, 2 if i else 4, 1) for i in range(4))

    def forward_stages(self, image):
        features = []
        for stage in self.stages:
            image = torch.tanh(2 * stage(image))
            features.append(image)
        return tuple(features), ()


class Nearest(nn.Module):
    """Sum of the stages, each repeated to stride 4, and a classifier."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Conv2d(6, 5, 1)

    def forward(self, features):
        height, width = features[0].shape[2:]
        total = 0
        for i, feature in enumerate(features):
            grown = feature.repeat_interleave(2**i, 2).repeat_interleave(2**i, 3)
            total = total + grown[:, :, :height, :width]
        return self.classifier(total)


def local(scale=1.0):
    torch.manual_seed(0)
    return Segmenter(Local(), Nearest(), 5, scale=scale).eval()


@pytest.mark.parametrize("size", [(500, 700), (701, 403), (130, 1009), (1030, 97)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_tiles_give_what_the_whole_image_gives(size, scale):
    """Where the network sees no farther than the margin; but for rounding where two classes are equal."""
    height, width = (round(side / scale / 8) * 8 for side in size) if scale != 1 else size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(image).resize((width // 9, height // 9)).resize((width, height)))  # soft shapes
    network = local(scale)
    whole, tiled = segment(network, image), segment(network, image, tile=512)
    assert len(np.unique(whole)) > 2
    assert (whole != tiled).mean() < 1e-4


def test_tiles_at_another_size_than_the_images(monkeypatch):
    """After a resize of validation, ids have the image's size."""
    import albumentations as A

    image = np.random.default_rng(0).integers(0, 256, (150, 201, 3), dtype=np.uint8)
    network, transform = local(), ImageTransform(A.Compose([A.Resize(601, 811)]))
    monkeypatch.setattr(tiling, "AT_ONCE", 1000)  # rows in many parts
    whole, tiled = segment(network, image, transform), segment(network, image, transform, tile=512)
    assert whole.shape == tiled.shape == (150, 201)
    assert (whole != tiled).mean() < 1e-3


def test_only_large_images_are_tiled_and_only_a_tile_is_computed(monkeypatch):
    network, seen = local(), []
    network.register_forward_pre_hook(lambda module, arguments: seen.append(tuple(arguments[0].shape[2:])))
    image = np.zeros((300, 420, 3), dtype=np.uint8)
    segment(network, image, tile="auto")
    segment(network, image, tile=512)
    segment(network, image, tile=None)
    assert seen == [(300, 420)] * 3
    seen.clear()
    segment(network, image, tile=256)
    assert max(max(size) for size in seen) == 256
    monkeypatch.setattr(predicting, "WHOLE", 300 * 420 - 1)
    monkeypatch.setattr(predicting, "AUTO_TILE", 128)
    seen.clear()
    segment(network, image, tile="auto")
    assert max(max(size) for size in seen) == 128


def test_logits_at_another_stride_cannot_be_tiled():
    network = local()
    network.head = nn.Sequential(Nearest(), nn.MaxPool2d(2))
    with pytest.raises(UserError, match="not at stride 4, so it cannot predict in tiles: set tile=null"):
        segment(network, np.zeros((300, 300, 3), dtype=np.uint8), tile=128)

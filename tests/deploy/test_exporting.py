"""The export: every format opened again by its own library, the check against the network, nothing half-written."""

import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from transkd import export
from transkd.data import CAMVID
from transkd.data.synthetic import draw_scene
from transkd.models import create_segmenter, load_segmenter, save_segmenter
from transkd.models.storage import exporting
from transkd.models.storage.exporting import plain_resize
from transkd.models.storage.resizing import resize_steps

CLASSES = len(CAMVID.names)
NON_COMMERCIAL = [
    {"part": "code", "source": "transkd", "license": "Apache-2.0"},
    {"part": "weights", "source": "mit_b0.pth", "license": "cc-by-nc-4.0"},
]
RESIZE = {"transform": {"__class_fullname__": "Compose", "transforms": [
    {"__class_fullname__": "Resize", "height": 64, "width": 96, "p": 1.0}]}}  # fmt: skip
TINY = {"encoder": {"channels": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "heads": [1, 2, 3, 4]}, "width": 16}
NAMES = {"onnx": "student.onnx", "torch": "student.pt2", "safetensors": "student.safetensors", "hf": "student"}
LONG = [pytest.param(form, marks=pytest.mark.slow) for form in ("onnx", "torch")]  # exporters trace the network
FORMS = ["safetensors", "hf", *LONG]
SIZES = ((64, 96), (80, 80), (75, 133))


def trained(name="segformer_b0", **args):
    """A network that is no fresh one: no two tensors are alike, its logits are of a trained network's size."""
    torch.manual_seed(0)
    network = create_segmenter(name, CLASSES, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), **args)
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.02 * (torch.rand_like(tensor) if "running" in key else torch.randn_like(tensor)))
        network.head.linear_pred.weight.mul_(10)
    network.lineage = copy.deepcopy(NON_COMMERCIAL)
    return network.eval()


@pytest.fixture(scope="module")
def network():
    return trained(**TINY)


@pytest.fixture(scope="module")
def source(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "trained.safetensors"
    save_segmenter(network, path, CAMVID, experiment="a test", eval_transform=RESIZE, teacher_name="segformer_b2")
    return path


def call(monkeypatch, *arguments):
    """Call the command; gives the error message, or None where it succeeds."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["transkd", *map(str, arguments)])
    try:
        export.main()
    except SystemExit as stop:
        return str(stop.code)
    return None


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """Where the network lies in a format; exported when first asked for."""
    folder = tmp_path_factory.mktemp("exports")

    def exported(form):
        path = folder / form / NAMES[form]
        if not path.exists():
            with pytest.MonkeyPatch.context() as monkeypatch:
                assert call(monkeypatch, f"weights={source}", f"format={form}", f"output={path}") is None
        return path

    return exported


@pytest.fixture
def run(monkeypatch, source, tmp_path):
    """Export to ``tmp_path/out``; gives the error message."""

    def run(form, *overrides, output=None, weights=source):
        where = output or tmp_path / "out" / NAMES[form]
        return call(monkeypatch, f"weights={weights}", f"format={form}", f"output={where}", *overrides)

    return run


def scenes(sizes=SIZES, batches=(1, 3)):
    """Drawn road scenes as batches of bytes."""
    rng = np.random.default_rng(1)
    for height, width in sizes:
        for count in batches:
            images = [draw_scene(rng, height, width, "fog")[0] for _ in range(count)]
            yield torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def logits(network, image):
    with torch.no_grad():
        return network(image, needs={"logits"}).logits


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def card_of(path, form):
    """What an exported file says of its network."""
    if form == "hf":
        return json.loads((path / "config.json").read_text())["transkd"]
    if form == "safetensors":
        with safe_open(path, framework="pt") as archive:
            return json.loads(archive.metadata()["transkd"])
    if form == "torch":
        extra = {"transkd.json": ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra["transkd.json"])
    import onnx

    return json.loads({prop.key: prop.value for prop in onnx.load(path).metadata_props}["transkd"])


# Each format, opened by its own library
@pytest.mark.slow
def test_onnx_gives_the_same_classes_at_any_size_and_batch(exported, network):
    theirs = session(exported("onnx"))
    assert [(i.name, i.shape, i.type) for i in theirs.get_inputs()] == [
        ("image", ["batch", 3, "height", "width"], "tensor(float)")
    ]
    assert [(o.name, o.shape[:2]) for o in theirs.get_outputs()] == [("logits", ["batch", CLASSES])]
    for image in scenes((*SIZES, (32, 32), (33, 47))):
        out = theirs.run(None, {"image": (image / 255).numpy()})[0]
        ours = logits(network, image).numpy()
        np.testing.assert_allclose(out, ours, rtol=0, atol=1e-4)
        assert (out.argmax(1) == ours.argmax(1)).all()


@pytest.mark.slow
def test_onnx_holds_the_networks_numbers_and_nothing_of_the_machine(exported, network):
    import onnx

    model = onnx.load(exported("onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 20
    sizes = {i.name: np.prod(i.dims) for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    constants = sum(size for name, size in sizes.items() if name in ("network.mean", "network.std") or size == 1)
    statistics = sum(b.numel() for name, b in network.named_buffers() if "running" in name)
    assert sum(sizes.values()) - constants == count(network) + statistics
    assert constants <= 6 + 1
    assert str(Path.cwd()).encode() not in model.SerializeToString()


@pytest.mark.slow
def test_torch_program_is_the_network(exported, network):
    program = torch.export.load(exported("torch"))
    assert sum(p.numel() for p in program.parameters()) == count(network)
    module = program.module()
    for image in scenes():
        torch.testing.assert_close(module(image / 255), logits(network, image), rtol=0, atol=1e-5)


def test_safetensors_holds_the_plain_tensors(exported, network):
    path = exported("safetensors")
    state, tensors = network.state_dict(), load_file(path)
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    create_segmenter("segformer_b0", CLASSES, **TINY).load_state_dict(tensors, strict=True)
    card = card_of(path, "safetensors")
    assert (card["experiment"], card["teacher_name"], card["recipe"]) == ("a test", "segformer_b2", network.recipe)


def test_transformers_loads_the_folder_strictly(exported, network):
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    folder = exported("hf")
    theirs, info = SegformerForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert count(theirs) == count(network)
    assert theirs.config.id2label == dict(enumerate(CAMVID.names))
    assert theirs.config.label2id["sky"] == 0
    processor = SegformerImageProcessor.from_pretrained(folder)
    assert (processor.size["height"], processor.size["width"], processor.do_resize) == (64, 96, True)
    for image in scenes():
        with torch.no_grad():
            out = theirs(**processor(list(image), do_resize=False, return_tensors="pt")).logits
        torch.testing.assert_close(out, logits(network, image), rtol=0, atol=1e-4)


def test_a_round_trip_through_hugging_face_loses_nothing(exported, network):
    again, card = load_segmenter(exported("hf"))
    state = network.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again.mean, network.mean)
    assert torch.equal(again.std, network.std)
    assert (again.name, again.recipe, again.lineage) == (network.name, network.recipe, network.lineage)
    assert tuple(card["class_names"]) == CAMVID.names
    assert [tuple(colour) for colour in card["palette"]] == list(CAMVID.palette)
    assert card["eval_transform"] == RESIZE


def test_what_transformers_trained_on_is_what_it_says_then(exported, tmp_path):
    """Their save_pretrained keeps our card in config.json, also of another classifier."""
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    names = {0: "wood", 1: "field", 2: "lake"}
    theirs = SegformerForSemanticSegmentation.from_pretrained(
        exported("hf"), num_labels=3, id2label=names, ignore_mismatched_sizes=True
    ).eval()
    theirs.save_pretrained(tmp_path)
    SegformerImageProcessor(do_resize=False, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path)
    ours, card = load_segmenter(tmp_path)
    image = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(logits(ours.eval(), image), logits_of((image - 0.5) / 0.25, theirs), rtol=0, atol=1e-4)
    assert card["class_names"] == [*names.values()]
    assert ours.lineage == NON_COMMERCIAL  # still from those weights
    assert {"palette", "eval_transform"}.isdisjoint(card)


def logits_of(image, theirs):
    with torch.no_grad():
        return theirs(image).logits


def test_the_model_card_states_the_lineage(exported):
    text = (exported("hf") / "README.md").read_text()
    front = text.split("---")[1]
    assert "license: cc-by-nc-4.0" in front
    assert "library_name: transformers" in front
    assert "mit_b0.pth (cc-by-nc-4.0)" in text
    assert "teacher_name: segformer_b2" in text
    assert "bicyclist" in text


@pytest.mark.parametrize("form", FORMS)
def test_the_card_survives_in_every_format(exported, network, form):
    card = card_of(exported(form), form)
    assert card["lineage"] == NON_COMMERCIAL
    assert tuple(card["class_names"]) == CAMVID.names
    assert card["recipe"] == network.recipe


@pytest.mark.parametrize("form", ["safetensors", *LONG])
def test_preprocessing_lies_beside_a_file(exported, network, form):
    folder = exported(form).parent
    assert sorted(path.name for path in folder.iterdir()) == sorted([NAMES[form], f"{NAMES[form]}.preprocess.json"])
    said = json.loads((folder / f"{NAMES[form]}.preprocess.json").read_text())
    assert said["model"] == NAMES[form]
    assert said["input"]["channels"] == "RGB"
    assert said["input"]["minimum_size"] == ([64, 64] if form == "torch" else [32, 32])
    assert said["normalisation"]["mean"] == network.mean.flatten().tolist()
    assert said["normalisation"]["inside_graph"] == (form != "safetensors")
    assert said["output"]["stride"] == 4
    assert said["eval_transform"] == RESIZE
    assert tuple(said["class_names"]) == CAMVID.names
    assert said["lineage"] == NON_COMMERCIAL


@pytest.mark.parametrize("form", ["safetensors", *LONG])
def test_a_network_that_shrinks_images_first(run, tmp_path, form):
    network = trained(**TINY, scale=0.5)
    save_segmenter(network, tmp_path / "half.safetensors", CAMVID)
    assert run(form, weights=tmp_path / "half.safetensors") is None
    said = json.loads((tmp_path / "out" / f"{NAMES[form]}.preprocess.json").read_text())
    assert said["output"]["stride"] == 8
    assert said["input"]["minimum_size"] == ([128, 128] if form == "torch" else [64, 64])


def test_hugging_face_shrinks_no_images(run, tmp_path):
    save_segmenter(trained(**TINY, scale=0.5), tmp_path / "half.safetensors", CAMVID)
    message = run("hf", weights=tmp_path / "half.safetensors")
    assert "format=hf: segformer_b0 resizes images by 0.5 first" in message


@pytest.mark.slow
def test_torch_program_folded(run, network, tmp_path):
    assert run("torch", "fuse=true") is None
    program = torch.export.load(tmp_path / "out" / "student.pt2")
    assert sum(p.numel() for p in program.parameters()) == count(network.fuse()) < count(network)


@pytest.mark.parametrize("form", ["hf", "safetensors"])
def test_only_graphs_are_folded(run, tmp_path, form):
    assert "fuse=true requires format=onnx" in run(form, "fuse=true")
    assert not (tmp_path / "out").exists()


# The check


def test_the_table_says_which_images_were_seen(run, tmp_path, capsys):
    assert run("safetensors") is None
    printed = capsys.readouterr().out
    assert "drawn scene" in printed
    assert "2×75×133" in printed
    assert "lineage: code: transkd" in printed

    rng = np.random.default_rng(0)
    (tmp_path / "frames").mkdir()
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (40, 56 + i, 3), dtype=np.uint8)).save(tmp_path / "frames" / f"{i}.png")
    Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(tmp_path / "frames" / "0.png")
    assert run("safetensors", f"images={tmp_path / 'frames'}") is None
    printed = capsys.readouterr().out
    assert "drawn scene" not in printed
    assert printed.count(".png") == 3  # evenly spaced
    assert "1×40×32" in printed  # too small for the network
    assert "1×40×59" in printed
    assert "no images for images=nowhere" in run("safetensors", "images=nowhere")


def test_a_difference_leaves_nothing(run, tmp_path, monkeypatch):
    form = exporting.FORMATS["safetensors"]

    def changed(path):
        opened = form.open(path)
        return opened._replace(run=lambda image: opened.run(image) + 0.01)

    monkeypatch.setitem(exporting.FORMATS, "safetensors", form._replace(open=changed))
    message = run("safetensors")
    assert "differs from the network by 1.00e-02" in message
    assert "tolerance=0.0001" in message
    assert list(tmp_path.iterdir()) == []

    kept = tmp_path / "student.safetensors"
    kept.write_bytes(b"as it was")
    assert "nothing was written" in run("safetensors", output=kept)
    assert kept.read_bytes() == b"as it was"
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("form", ["hf", pytest.param("torch", marks=pytest.mark.slow)])
def test_the_tolerance_is_held(run, tmp_path, form):
    overrides = ["tolerance=0", *(["fuse=true"] if form == "torch" else [])]  # unfolded it is equal to the bit
    message = run(form, *overrides)
    assert "tolerance=0" in message
    assert ("LayerNorm" in message) == (form == "hf")
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_is_a_difference(run, tmp_path, monkeypatch):
    form = exporting.FORMATS["safetensors"]
    broken = form._replace(open=lambda path: form.open(path)._replace(run=lambda x: form.open(path).run(x) * torch.nan))
    monkeypatch.setitem(exporting.FORMATS, "safetensors", broken)
    assert "differs from the network by nan" in run("safetensors")
    assert list(tmp_path.iterdir()) == []


# Where it is written


@pytest.mark.parametrize("form", ["safetensors", "hf"])
def test_output_below_a_file(run, tmp_path, monkeypatch, form):
    monkeypatch.setattr("transkd.deploy.exporting.load_network", None)  # said before anything is loaded
    (tmp_path / "file").touch()
    message = run(form, output=tmp_path / "file" / "deeper" / "student")
    assert message.startswith("error: cannot write")
    assert "file is a file" in message
    assert "\n" not in message


def test_output_in_a_folder_that_cannot_be_written(run, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("transkd.deploy.exporting.load_network", None)
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert "student.safetensors: Permission denied" in run("safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["safetensors", "hf"])
def test_a_full_disk_leaves_what_was_there(run, tmp_path, monkeypatch, form):
    assert run(form) is None
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    replace = os.replace

    def full(source, target):
        if Path(target) == tmp_path / "out" / NAMES[form] and "replaced" not in str(source):
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert "No space left on device" in run(form)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_of_somebody_else_is_refused(run, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert "contains other files, which are not overwritten" in run("hf", output=folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["models", "config.json"]
    assert "a folder has that name" in run("safetensors", output=folder)
    assert "is a file; format=hf writes a folder" in run("hf", output=folder / "config.json")


def test_an_export_is_replaced_whole(run, tmp_path):
    (tmp_path / "out" / "student").mkdir(parents=True)
    assert run("hf") is None
    (tmp_path / "out" / "student" / "stale.bin").touch()
    assert run("hf") is None
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["out", "student", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    )


# What is refused


def test_a_commercial_policy_refuses_non_commercial_weights(run, tmp_path):
    message = run("safetensors", "license_policy=commercial")
    assert "refuses" in message
    assert "cc-by-nc-4.0" in message
    assert list(tmp_path.iterdir()) == []
    assert "license_policy=strict: expected any or commercial" in run("safetensors", "license_policy=strict")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=tflite"], "unknown format=tflite; there are: onnx, hf, torch, safetensors"),
        (["format=torch", "output=student.pt"], "format=torch requires a file name with suffix .pt2"),
        (["format=onnx", "output=student.onnx", "opset=17"], "opset=17 is too old"),
        (["format=onnx", "output=student.onnx", "weights=nowhere.pth"], "weights file not found: nowhere.pth"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, source, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    said = call(monkeypatch, f"weights={source}", "output=student", *arguments)
    assert said.startswith(f"error: {message}")
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "package"), [("onnx", "onnxruntime"), ("hf", "transformers")])
def test_a_missing_package_is_named(run, monkeypatch, form, package):
    monkeypatch.setattr("transkd.deploy.exporting.find_spec", lambda name: None if name == package else object())
    assert f"format={form} needs the package {package}: pip install 'transkd[export]'" in run(form)


def test_hugging_face_has_no_other_networks(run, tmp_path):
    path = tmp_path / "fpn.safetensors"
    save_segmenter(create_segmenter("resnet18", CLASSES, head="fpn", width=64), path, CAMVID)
    message = run("hf", weights=path)
    assert "format=hf is only for SegFormer" in message
    assert "onnx, torch, safetensors" in message
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_traced_is_one_line(run, network, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting._Logits, "forward", lambda self, image: image if image.sum() > 0 else -image)
    message = run("torch")
    assert "segformer_b0 cannot be traced by torch.export" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_plain_resize():
    import albumentations as A

    assert plain_resize(A.Resize(64, 96).to_dict()) == (64, 96)
    assert plain_resize(A.Compose([A.CenterCrop(32, 32), A.Resize(64, 96)]).to_dict()) is None
    assert plain_resize(A.Compose([A.PadIfNeeded(64, 96)]).to_dict()) is None
    assert plain_resize(None) is None


def test_a_resize_keeps_its_way_of_shrinking():
    import albumentations as A

    transform = A.Compose([A.Resize(8, 8, area_for_downscale="image"), A.LongestMaxSize(4, area_for_downscale="image")])
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    again = A.Compose([getattr(A, name)(**values) for name, values in resize_steps(transform.to_dict())])
    assert np.array_equal(again(image=image)["image"], transform(image=image)["image"])


# The command
@pytest.mark.slow
def test_the_command_line(source, tmp_path):
    def command(*arguments):
        line = [sys.executable, "-m", "transkd.export", f"weights={source}", *arguments]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)

    done = command("format=safetensors", "output=deeper/student.safetensors")
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    assert sorted(p.name for p in (tmp_path / "deeper").iterdir()) == [
        "student.safetensors",
        "student.safetensors.preprocess.json",
    ]

    done = command("format=safetensors", "output=deeper/student.safetensors/below")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write")
    assert done.stderr.count("\n") == 1


# Whole networks


@pytest.mark.slow
@pytest.mark.parametrize("form", NAMES)
def test_b0_keeps_exactly_its_parameters(run, tmp_path, capsys, form):
    network = trained()
    save_segmenter(network, tmp_path / "b0.safetensors", CAMVID)
    assert run(form, weights=tmp_path / "b0.safetensors") is None
    opened = exporting.FORMATS[form].open(tmp_path / "out" / NAMES[form])
    statistics = 2 * 256 if form == "onnx" else 0
    assert opened.parameters == count(network) + statistics == 3_716_971 + statistics


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torch"])
@pytest.mark.parametrize("name", ["pvt_v2_b0", "lvt", "deeplabv3plus_resnet101"])
def test_other_networks(run, tmp_path, name, form):
    torch.manual_seed(0)
    save_segmenter(create_segmenter(name, CLASSES), tmp_path / "other.safetensors", CAMVID)
    assert run(form, weights=tmp_path / "other.safetensors") is None


ROOT = os.environ.get("CAMVID_ROOT")


@pytest.mark.slow
@pytest.mark.skipif(not ROOT or not Path(ROOT).is_dir(), reason="no CamVid: set CAMVID_ROOT to its folder")
def test_onnx_agrees_on_every_pixel_of_camvid(run, tmp_path):
    """But for rounding: pixels whose two best logits are closer than 1e-4."""
    from transkd.data import find_camvid
    from transkd.data.dataset import read_image

    network = trained()
    save_segmenter(network, tmp_path / "b0.safetensors", CAMVID)
    assert run("onnx", weights=tmp_path / "b0.safetensors") is None
    onnx = session(tmp_path / "out" / "student.onnx")
    for pair in find_camvid(ROOT, "val"):
        image = torch.from_numpy(read_image(pair.image).transpose(2, 0, 1).copy())[None]
        theirs = torch.from_numpy(onnx.run(None, {"image": (image / 255).numpy()})[0])
        ours, theirs = (
            F.interpolate(out, size=image.shape[2:], mode="bilinear", align_corners=False)
            for out in (logits(network, image), theirs)
        )
        best = ours.topk(2, dim=1).values
        clear = best[:, 0] - best[:, 1] >= 1e-4
        assert (ours.argmax(1) == theirs.argmax(1))[clear].all()

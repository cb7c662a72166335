import json
import logging
import os
import pickle
import random
import re
import stat

import golden
import pytest
import safetensors
import safetensors.torch
import torch

from transkd.data.classes import CAMVID
from transkd.errors import UserError
from transkd.models import create_segmenter, load_segmenter, load_weights, save_segmenter
from transkd.models.storage.sources import CARD
from transkd.models.weights import describe, read_weights


def equal(network, tensors):
    state = network.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in state)


def published(network, prefix=""):
    """A network's tensors under the names that MiT and SegFormer checkpoints have, without batch counters."""
    state = {name.split(".", 1)[1]: tensor for name, tensor in network.state_dict().items()}
    return {prefix + name: tensor.clone() for name, tensor in state.items() if "num_batches" not in name}


@pytest.fixture
def trained(b0):
    """A network that is no fresh one."""
    with torch.no_grad():
        for tensor in b0.parameters():
            tensor.add_(0.01)
        b0.head.linear_fuse.bn.running_mean.fill_(3.0)
        b0.head.linear_fuse.bn.num_batches_tracked.fill_(7)
    return b0


@pytest.fixture
def fresh():
    """Another start than the one that was saved, with ImageNet's normalisation."""
    torch.manual_seed(1)
    return create_segmenter("segformer_b0", num_classes=5)


@pytest.fixture
def saved(trained, tmp_path):
    path = tmp_path / "student.safetensors"
    save_segmenter(trained, path, CAMVID, experiment="test", seed=3)
    return path


def refused(path, message, network=None):
    """Loading ends in one line for the user that names the file."""
    with pytest.raises(UserError, match=message) as caught:
        read_weights(path) if network is None else load_weights(network, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Our own files


def test_round_trip(saved, trained, fresh):
    assert not equal(fresh, trained.state_dict())
    load_weights(fresh, saved)
    assert equal(fresh, trained.state_dict())
    torch.testing.assert_close(fresh.mean, trained.mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(fresh.std, trained.std, rtol=0, atol=1e-7)


def test_the_card_builds_the_network_again(saved, trained):
    network, card = load_segmenter(saved)
    assert equal(network, trained.state_dict())
    assert (network.name, network.num_classes) == ("segformer_b0", 5)
    assert card["mean"] == pytest.approx([0.1, 0.2, 0.3])
    assert card["std"] == pytest.approx([0.4, 0.5, 0.6])
    assert network.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert tuple(card["class_names"]) == CAMVID.names
    assert [tuple(colour) for colour in card["palette"]] == list(CAMVID.palette)
    assert (card["experiment"], card["seed"]) == ("test", 3)


def test_a_file_holds_the_plain_network_in_plain_safetensors(saved, trained):
    with safetensors.safe_open(saved, framework="pt") as archive:
        assert set(archive.keys()) == set(trained.state_dict())
        assert json.loads(archive.metadata()[CARD])["name"] == "segformer_b0"


def test_weights_by_argument(saved, trained):
    network = create_segmenter("segformer_b0", num_classes=5, weights=saved)
    assert equal(network, trained.state_dict())


def test_a_network_on_another_dtype_keeps_it(saved, trained, fresh):
    load_weights(fresh.double(), saved)
    assert {parameter.dtype for parameter in fresh.parameters()} == {torch.float64}
    torch.testing.assert_close(fresh.head.linear_pred.bias.float(), trained.head.linear_pred.bias)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "kill"])
@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_an_interrupted_save_keeps_the_previous_file(saved, trained, fresh, monkeypatch, failure, step):
    def fail(*_):
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises((UserError, KeyboardInterrupt)):
        save_segmenter(fresh, saved)
    monkeypatch.undo()
    assert list(saved.parent.iterdir()) == [saved]
    assert equal(load_segmenter(saved)[0], trained.state_dict())


def test_a_save_replaces_and_makes_folders(saved, fresh, tmp_path):
    save_segmenter(fresh, saved)
    assert equal(load_segmenter(saved)[0], fresh.state_dict())
    deeper = tmp_path / "a" / "b" / "student.safetensors"
    save_segmenter(fresh, deeper)
    assert deeper.is_file()


def test_others_may_read_what_the_umask_lets_them(saved):
    ordinary = saved.with_name("ordinary")
    ordinary.touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_a_checkpoint_of_a_run(trained, fresh, tmp_path):
    """The student alone is read; the terms beside it and the optimizer are left."""
    path = tmp_path / "last.ckpt"
    tensors = {f"student.{name}": tensor for name, tensor in trained.state_dict().items()}
    tensors["criterion.terms.pea.projections.1.weight"] = torch.ones(2, 2)
    content = {"epoch": 3, "state_dict": tensors, "optimizer_states": [{"state": {}}], CARD: describe(trained, CAMVID)}
    torch.save(content, path)
    load_weights(fresh, path)
    assert equal(fresh, trained.state_dict())
    torch.testing.assert_close(fresh.mean, trained.mean, rtol=0, atol=1e-7)
    network, card = load_segmenter(path)
    assert equal(network, trained.state_dict())
    assert card["num_classes"] == 5


# Files of others


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_an_imagenet_encoder_leaves_the_head(trained, fresh, tmp_path, caplog, wrapper):
    path = tmp_path / "mit_b0.pth"
    encoder = {k: v for k, v in published(trained).items() if not k.startswith("linear")}
    encoder |= {"head.weight": torch.ones(1000, 256), "head.bias": torch.ones(1000)}
    torch.save({wrapper: encoder} if wrapper else encoder, path)
    before = {name: tensor.clone() for name, tensor in fresh.head.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load_weights(fresh, path)
    assert equal(fresh.encoder, trained.encoder.state_dict())
    assert equal(fresh.head, before)
    assert "only an encoder" in caplog.text
    assert fresh.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])  # a foreign file brings none


def test_a_whole_segformer_in_the_published_naming(trained, fresh, tmp_path):
    path = tmp_path / "segformer.pth"
    torch.save({"state_dict": published(trained, "module.")}, path)
    trained.head.linear_fuse.bn.num_batches_tracked.zero_()  # the file has none
    load_weights(fresh, path)
    assert equal(fresh, trained.state_dict())


@pytest.mark.parametrize("prefix", ["student.", "module.student."])
def test_the_authors_checkpoint(tmp_path, caplog, prefix):
    """20 outputs, the last of them "ignore"; terms beside the student."""
    torch.manual_seed(0)
    theirs = create_segmenter("segformer_b0", num_classes=20)
    module = prefix.removesuffix("student.")
    terms = {module + name: tensor for name, tensor in golden.load("pea", "param.").items()}
    path = tmp_path / "best.pth"
    torch.save(published(theirs, prefix) | terms, path)
    ours = create_segmenter("segformer_b0", num_classes=19)
    with caplog.at_level(logging.INFO):
        load_weights(ours, path)
    expected = theirs.state_dict()
    for name in ("head.linear_pred.weight", "head.linear_pred.bias"):
        assert len(expected[name]) == 20
        expected[name] = expected[name][:19]
    assert equal(ours, expected)
    assert "dropped the 20th output" in caplog.text
    assert equal(load_segmenter(path)[0], expected)  # the file alone says as much


def test_one_output_too_many_is_dropped_for_19_classes_alone(tmp_path, fresh):
    path = tmp_path / "six.pth"
    torch.save(published(create_segmenter("segformer_b0", num_classes=6)), path)
    refused(path, r"head.linear_pred.weight: expected \[5, 256, 1, 1\], got \[6, 256, 1, 1\]", fresh)


# What does not fit


def test_another_architecture_names_the_first_tensors_with_both_shapes(tmp_path, fresh):
    path = tmp_path / "b1.safetensors"
    save_segmenter(create_segmenter("segformer_b1", num_classes=5), path)
    message = refused(path, r"does not fit segformer_b0 with 5 classes", fresh)
    assert "encoder.patch_embed1.proj.weight: expected [32, 3, 7, 7], got [64, 3, 7, 7]" in message
    assert re.search(r"and \d+ more", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.norm1.weight"), "encoder.norm1.weight: missing in the file"),
        (lambda t: t.update({"head.extra": torch.zeros(1)}), "head.extra: not in the network"),
    ],
)
def test_loading_is_strict(saved, fresh, change, message):
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    tensors = safetensors.torch.load_file(saved)
    change(tensors)
    safetensors.torch.save_file(tensors, saved)
    refused(saved, message, fresh)
    assert equal(fresh, before)


def test_a_foreign_file_says_nothing_of_its_network(tmp_path):
    path = tmp_path / "foreign.pth"
    torch.save({"layer1.0.conv1.weight": torch.zeros(4, 3, 3, 3)}, path)
    with pytest.raises(UserError, match=r"foreign.pth does not say which network.*looks like a ResNet.*student=…"):
        load_segmenter(path)


def test_a_whole_segformer_of_anybodys_builds_itself(tmp_path, trained):
    path = tmp_path / "segformer.pth"
    torch.save(published(trained), path)
    network, card = load_segmenter(path)
    assert (network.name, network.num_classes, card["num_classes"]) == ("segformer_b0", 5, 5)
    trained.head.linear_fuse.bn.num_batches_tracked.zero_()  # the file has none
    assert equal(network, trained.state_dict())


# What is no file of weights


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_pickle_is_executed(tmp_path):
    mark = tmp_path / "executed"
    for name, write in {
        "plain.pth": lambda path: path.write_bytes(pickle.dumps({"state_dict": Bomb(mark)})),
        "zip.pth": lambda path: torch.save({"weight": torch.zeros(1), "more": Bomb(mark)}, path),
    }.items():
        write(tmp_path / name)
        refused(tmp_path / name, "is not a readable weights file: expected safetensors or a PyTorch checkpoint")
    assert not mark.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())  # the bomb is live
    assert mark.exists()


def test_missing(tmp_path):
    refused(tmp_path / "nowhere.pth", "weights file not found")
    refused(tmp_path, r"is not a folder of weights: expected config.json and model.safetensors")


@pytest.mark.parametrize("size", [0, 5, 8, 9, 100, -1])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch before zip"])
def test_truncated(tmp_path, kind, size):
    path = tmp_path / "cut.pth"
    tensors = {f"encoder.{i}": torch.rand(16, 16) for i in range(4)}
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "torch")
    assert read_weights(path).tensors.keys() == tensors.keys()
    path.write_bytes(path.read_bytes()[:size])
    refused(path, r"damaged|is not a readable weights file")


@pytest.mark.parametrize(
    "content",
    [
        b"These are not weights.\n",
        b"<html><head><title>404</title></head></html>",
        b'{"weights": 1}\n',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        b"PK\x03\x04" + bytes(64),
        b"weights:{ no header }",
        bytes(64),
        bytes(range(256)),
    ],
    ids=lambda content: repr(content[:8]),
)
def test_foreign(tmp_path, content):
    path = tmp_path / "foreign.bin"
    path.write_bytes(content)
    refused(path, r"damaged safetensors|is not a readable weights file")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_altered_bytes_are_an_error_for_the_user_or_harmless(tmp_path):
    path = tmp_path / "altered.pth"
    torch.save({"encoder.weight": torch.rand(4, 4)}, path, _use_new_zipfile_serialization=False)
    whole, rng = path.read_bytes(), random.Random(0)
    refusals = 0
    for _ in range(200):
        altered = bytearray(whole)
        for _ in range(3):
            altered[rng.randrange(len(altered))] = rng.randrange(256)
        path.write_bytes(altered)
        try:
            read_weights(path)
        except UserError:
            refusals += 1
    assert 20 < refusals < 200


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], torch.zeros(3), {"state_dict": {}}])
def test_a_checkpoint_without_tensors_by_name(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    refused(path, "contains no weights: expected a mapping of names to tensors")

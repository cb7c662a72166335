"""Hubs, folders, and the rules of loading."""

import json
import logging

import pytest
import timm
import torch

from transkd.errors import UserError
from transkd.models import Tapped, create_segmenter, load_segmenter, load_weights, save_segmenter
from transkd.models.storage.sources import NVIDIA, read_weights


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """The hub's library with an empty cache and without a way out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def in_cache(cache, repository, write):
    """Put a repository where the hub's library looks for what it has fetched before."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    write(snapshot)


def segformer(folder):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    SegformerForSemanticSegmentation(SegformerConfig(num_labels=6)).save_pretrained(folder)


def test_a_hub_id(no_network):
    in_cache(no_network, "somebody/segformer", segformer)
    network, _ = load_segmenter("hf://somebody/segformer")
    assert (network.name, network.num_classes) == ("segformer_b0", 6)
    assert network.lineage[-1] == {"part": "weights", "source": "hf://somebody/segformer", "license": None}


def test_nvidias_ids_carry_nvidias_licence(no_network):
    in_cache(no_network, "nvidia/segformer-b0-finetuned-cityscapes-1024-1024", segformer)
    weights = read_weights("hf://nvidia/segformer-b0-finetuned-cityscapes-1024-1024")
    assert weights.lineage[-1]["license"] == NVIDIA


def test_a_timm_id(no_network):
    torch.manual_seed(0)
    theirs = timm.create_model("pvt_v2_b0")
    in_cache(
        no_network, "timm/pvt_v2_b0.in1k", lambda path: timm.models.save_for_hf(theirs, path, safe_serialization=True)
    )
    ours = create_segmenter("pvt_v2_b0", num_classes=5, weights="timm://pvt_v2_b0.in1k")
    assert torch.equal(ours.encoder.body.patch_embed.proj.weight, theirs.patch_embed.proj.weight)
    assert ours.lineage[-1]["license"] == "apache-2.0"


@pytest.mark.parametrize("source", ["hf://nvidia/segformer-b2", "timm://pvt_v2_b2.in1k"])
def test_a_hub_that_cannot_be_reached_says_how_to_do_without(no_network, source):
    with pytest.raises(
        UserError, match=r"cannot fetch .*hf download \S+ --local-dir FOLDER.* give it as the weights"
    ) as e:
        read_weights(source)
    assert source in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm://resnet999", r"timm has no network 'resnet999' \(timm://resnet999\); timm.list_models"),
        ("timm://pvt_v2_b2.nope", r"hub has no weights of timm's 'pvt_v2_b2.nope'.*available: pvt_v2_b2.in1k"),
        ("hf://not a name", r"cannot fetch hf://not a name .*Is the name right\?"),
    ],
)
def test_a_name_that_is_none(no_network, source, message):
    with pytest.raises(UserError, match=message):
        read_weights(source)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a folder of weights: expected config\.json and"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "segformer"}')
    with pytest.raises(UserError, match=r"has a config\.json, but neither model\.safetensors nor pytorch_model\.bin"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not readable JSON"):
        read_weights(tmp_path)


def test_a_damaged_timm_folder(tmp_path):
    timm.models.save_for_hf(timm.create_model("resnet18"), tmp_path, safe_serialization=True)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="timm cannot load"):
        read_weights(tmp_path)


def test_a_runs_folder(b0, tmp_path):
    save_segmenter(b0, tmp_path / "student.safetensors")
    network, _ = load_segmenter(tmp_path)
    assert torch.equal(network.head.linear_pred.bias, b0.head.linear_pred.bias)


def test_the_authors_feed_the_image_as_it_is(b0, tmp_path):
    state = {f"student.{name.split('.', 1)[1]}": tensor for name, tensor in b0.state_dict().items()}
    torch.save(state, tmp_path / "best.pth")
    network, _ = load_segmenter(tmp_path / "best.pth")
    assert (network.mean.flatten().tolist(), network.std.flatten().tolist()) == ([0, 0, 0], [1, 1, 1])
    assert network.lineage[-1]["license"] == NVIDIA


# Classes


def test_other_classes_need_a_rule(b0, tmp_path, caplog):
    save_segmenter(b0, tmp_path / "five.safetensors")
    message = (
        r"five.safetensors has 5 classes, segformer_b0 was built for 11: head.linear_pred.weight: expected "
        r"\[11, 256, 1, 1\], got \[5, 256, 1, 1\].*student.classifier=new.*teacher.network.num_classes=5"
    )
    with pytest.raises(UserError, match=message):
        create_segmenter("segformer_b0", num_classes=11, weights=tmp_path / "five.safetensors")
    with caplog.at_level(logging.INFO):
        network = create_segmenter(
            "segformer_b0", num_classes=11, weights=tmp_path / "five.safetensors", classifier="new"
        )
    assert "head.linear_pred.weight is initialised at random (classifier=new)" in caplog.text
    assert torch.equal(network.head.linear_fuse.conv.weight, b0.head.linear_fuse.conv.weight)
    assert len(network.head.linear_pred.weight) == 11


def test_the_rule_renews_nothing_but_a_classifier(b0, tmp_path):
    save_segmenter(b0, tmp_path / "b0.safetensors")
    with pytest.raises(UserError, match="does not fit segformer_b1"):
        create_segmenter("segformer_b1", num_classes=11, weights=tmp_path / "b0.safetensors", classifier="new")
    with pytest.raises(UserError, match="classifier must be 'same' or 'new', got 'fresh'"):
        load_weights(b0, tmp_path / "b0.safetensors", classifier="fresh")


# Licence lineage


def test_what_nobody_stated_takes_the_users_word(b0, tmp_path):
    torch.save(b0.state_dict(), tmp_path / "own.pth")
    load_weights(b0, tmp_path / "own.pth")
    assert b0.lineage[-1]["license"] is None
    load_weights(b0, tmp_path / "own.pth", license="Apache-2.0")
    assert b0.lineage[-1]["license"] == "Apache-2.0"


def test_lineage_survives_saving_and_loading(b0, tmp_path):
    b0.lineage = [{"part": "weights", "source": "mit_b0.pth", "license": NVIDIA}]
    save_segmenter(b0, tmp_path / "one.safetensors")
    network, _ = load_segmenter(tmp_path / "one.safetensors")
    save_segmenter(network, tmp_path / "two.safetensors")
    again = create_segmenter("segformer_b0", num_classes=5, weights=tmp_path / "two.safetensors", license="MIT")
    assert again.lineage == b0.lineage  # and no word of the user's replaces what a file states


# Any module


def test_a_wrapped_modules_file_holds_its_own_names(tmp_path):
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    def build():
        module = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
        return Tapped(module, features=["backbone.4", "backbone.16"])

    one, other = build(), build()
    save_segmenter(one, tmp_path / "student.safetensors")
    load_weights(other, tmp_path / "student.safetensors")
    assert all(torch.equal(tensor, other.module.state_dict()[name]) for name, tensor in one.state_dict().items())
    torch.save(one.module.state_dict(), tmp_path / "bare.pth")
    load_weights(other, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"does not say which network it contains"):
        load_segmenter(tmp_path / "student.safetensors")


@pytest.mark.slow
def test_the_card_builds_networks_of_every_kind(tmp_path):
    torch.manual_seed(0)
    args = {"head": "fpn", "width": 64, "encoder": {"drop_path_rate": 0.2}, "mean": (0, 0, 0), "std": (1, 1, 1)}
    for name in ("pvt_v2_b0", "lvt", "resnet18"):
        network = create_segmenter(name, num_classes=3, **({} if name == "lvt" else args))
        save_segmenter(network, tmp_path / "n.safetensors")
        again, card = load_segmenter(tmp_path / "n.safetensors")
        assert again.recipe == network.recipe == card["recipe"]
        assert json.dumps(card)
        image = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(network.eval()(image).logits, again.eval()(image).logits)

"""Folders of transformers in all their forms, names that wrappers add, and networks of sizes of their own."""

import json

import pytest
import torch

from transkd.deploy.loading import load_network
from transkd.errors import UserError
from transkd.models import ENCODERS, create_segmenter, load_segmenter, load_weights, save_segmenter
from transkd.models.storage.sources import read_weights
from transkd.settings import NetworkSettings

OWN = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}


@pytest.fixture(scope="module")
def theirs():
    """A SegFormer of transformers, of sizes that no published one has."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    config = SegformerConfig(num_labels=3, decoder_hidden_size=16, sr_ratios=[8, 4, 2, 1], **OWN)
    return SegformerForSemanticSegmentation(config).eval()


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


def agrees(network, theirs):
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        ours, others = network.eval()(image).logits, theirs(network.normalise(image)).logits
    torch.testing.assert_close(ours, others, rtol=0, atol=1e-4)
    return True


def test_own_sizes_come_from_config_json(folder, theirs):
    network, _ = load_segmenter(folder)
    assert network.recipe == {
        "name": "segformer_b0",
        "num_classes": 3,
        "width": 16,
        "encoder": {
            "channels": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "heads": [1, 2, 2, 4],
            "reductions": [8, 4, 2, 1],
            "mlp_ratio": 4,
        },
    }
    assert agrees(network, theirs)


@pytest.mark.parametrize("safe", [True, False])
def test_several_files_with_an_index(theirs, tmp_path, safe):
    folder = tmp_path / "hub"
    theirs.save_pretrained(folder, max_shard_size="20KB")
    if not safe:  # transformers writes .bin no longer
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        for path in folder.glob("model-*"):
            torch.save(dict(read_weights(path).original), folder / f"pytorch_{path.stem}.bin")
            path.unlink()
        index["weight_map"] = {
            name: f"pytorch_{place.replace('.safetensors', '.bin')}" for name, place in index["weight_map"].items()
        }
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors.index.json").unlink()
    assert agrees(load_segmenter(folder)[0], theirs)
    last = sorted(folder.glob("*model-*"))[-1]
    last.unlink()
    with pytest.raises(UserError, match=f"not found.*{last.name}"):
        load_segmenter(folder)


def test_an_index_leads_to_no_other_folder(theirs, tmp_path):
    folder = tmp_path / "hub"
    theirs.save_pretrained(folder, max_shard_size="20KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for place in ("../secret.safetensors", "/etc/passwd", "", "..", 5, None):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], "decode_head.classifier.bias": place}}))
        with pytest.raises(UserError, match=r"names '.*', expected a file of the folder|no weight_map"):
            load_segmenter(folder)


def test_a_hash_in_our_export_finds_damage(tmp_path):
    from transkd.models.storage.exporting import complete_card
    from transkd.models.storage.huggingface import write_huggingface

    encoder = {"channels": [8, 16, 24, 32], "heads": [1, 2, 3, 4]}
    network = create_segmenter("segformer_b0", 3, width=8, encoder=encoder).eval()
    write_huggingface(network, complete_card(network, {}), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    load_segmenter(tmp_path / "hf")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="its tensors differ from its hash"):
        load_segmenter(tmp_path / "hf")


@pytest.mark.parametrize(
    ("size", "name", "values"),
    [
        (512, "Resize", {"height": 512, "width": 512}),
        ({"height": 96, "width": 128}, "Resize", {"height": 96, "width": 128}),
        ({"shortest_edge": 256}, "SmallestMaxSize", {"max_size": 256}),
    ],
)
def test_sizes_of_a_preprocessor(folder, size, name, values):
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_resize": True, "size": size}))
    step = load_segmenter(folder)[1]["eval_transform"]["transform"]
    assert step["__class_fullname__"] == name
    assert values.items() <= step.items()


@pytest.mark.parametrize(
    "preprocessor",
    [
        {"do_resize": True, "size": "large"},
        {"do_resize": True, "size": -5},
        {"do_resize": True, "size": {"height": 10**9, "width": 1}},
        {"image_mean": "grey", "image_std": [1, 1, 1]},
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0, 0, 0]},
        {"rescale_factor": 1},
        {"rescale_factor": "1/255"},
    ],
)
def test_malformed_preprocessors_are_one_line(folder, preprocessor):
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    with pytest.raises(UserError, match="config") as caught:
        load_segmenter(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["---\nlicense: &a [x, x]\n---\n", "---\n- 1\n---\n", "---\nlicense: {a: *b}\n---\n"])
def test_a_readme_that_states_no_readable_licence(folder, text):
    (folder / "README.md").write_text(text)
    assert load_segmenter(folder)[0].lineage[-1]["license"] is None


# Names


@pytest.fixture(scope="module")
def b0():
    torch.manual_seed(0)
    return create_segmenter("segformer_b0", 3, width=16)


@pytest.mark.parametrize(
    "prefix",
    ["model.", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.", "model.model."],
)
def test_names_of_wrappers(b0, tmp_path, prefix):
    """DataParallel, torch.compile, and a LightningModule's attribute; a width of its own is read from the shapes."""
    torch.save({"state_dict": {prefix + n: t for n, t in b0.state_dict().items()}}, tmp_path / "wrapped.pth")
    network, _ = load_segmenter(tmp_path / "wrapped.pth")
    assert network.recipe == b0.recipe
    assert all(torch.equal(tensor, b0.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_compiled_parts(b0, tmp_path):
    torch.save({n.replace("encoder.block1.", "encoder.block1._orig_mod."): t for n, t in b0.state_dict().items()},
               tmp_path / "compiled.pth")  # fmt: skip
    assert load_segmenter(tmp_path / "compiled.pth")[0].recipe == b0.recipe


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_state_dict_of_transformers_5(theirs, tmp_path, prefix):
    """In memory its modules have other names than in the files that it saves."""
    torch.save({prefix + name: tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "theirs.pth")
    encoder = {"channels": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "heads": [1, 2, 2, 4]}
    with pytest.raises(UserError, match=r"network.name=… network.num_classes=… to predict and export"):
        load_segmenter(tmp_path / "theirs.pth")
    stated = NetworkSettings(name="segformer_b0", num_classes=3, width=16, encoder=encoder)
    network, card = load_network(str(tmp_path / "theirs.pth"), stated)
    assert agrees(network, theirs)
    assert card["num_classes"] == 3


def test_a_stated_network_needs_a_whole_one(b0, tmp_path):
    torch.save({n: t for n, t in b0.state_dict().items() if n.startswith("encoder.")}, tmp_path / "encoder.pth")
    with pytest.raises(UserError, match="no tensors of a decode head"):
        load_network(str(tmp_path / "encoder.pth"), NetworkSettings(name="segformer_b0", num_classes=3))
    with pytest.raises(UserError, match=r"set network.num_classes"):
        load_network(str(tmp_path / "encoder.pth"), NetworkSettings(name="segformer_b0"))


# Plugins


def test_a_missing_plugin_is_named_and_not_imported(tmp_path, monkeypatch):
    class Plain(torch.nn.Module):
        channels = (4, 4, 4, 4)

        def __init__(self, depth=1):
            super().__init__()
            self.stages = torch.nn.ModuleList(torch.nn.Conv2d(4 if i else 3, 4, 3, 2 if i else 4, 1) for i in range(4))

        def forward_stages(self, image):
            features = []
            for stage in self.stages:
                image = stage(image)
                features.append(image)
            return tuple(features), ()

    Plain.__module__ = "no_such_plugin.networks"
    monkeypatch.setitem(ENCODERS, "plain", Plain)
    network = create_segmenter("plain", 3, width=8, encoder={"depth": 1})
    save_segmenter(network, tmp_path / "student.safetensors")
    again, card = load_segmenter(tmp_path / "student.safetensors")
    assert (again.recipe, card["plugins"]) == (network.recipe, ["no_such_plugin"])
    monkeypatch.delitem(ENCODERS, "plain")
    with pytest.raises(UserError, match=r"plain of the plugin no_such_plugin.*set plugins=\[no_such_plugin\]"):
        load_segmenter(tmp_path / "student.safetensors")


def test_a_bare_module_loads_under_wrappers_names(tmp_path):
    from transkd.models import Tapped

    def build():
        return Tapped(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, 4), torch.nn.Conv2d(4, 3, 1)), features=["0"])

    one, other = build(), build()
    torch.save({f"module.{name}": tensor for name, tensor in one.state_dict().items()}, tmp_path / "bare.pth")
    load_weights(other, tmp_path / "bare.pth")
    assert torch.equal(one.module[0].weight, other.module[0].weight)
    save_segmenter(one, tmp_path / "student.safetensors")
    with pytest.raises(UserError, match=r"Sequential, a module that a _target_ built.*evaluate takes it"):
        load_segmenter(tmp_path / "student.safetensors")

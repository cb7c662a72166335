"""Files of other libraries, each made by that library itself with random weights."""

import json
import logging

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from transkd.errors import UserError
from transkd.models import create_segmenter, load_segmenter
from transkd.models.storage.formats import looks_like, rename_to_huggingface, rename_to_ours
from transkd.models.storage.sources import NVIDIA, read_weights

IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def randomise(network):
    """Weights of ordinary size, running statistics that are no 0 and 1."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return network.eval()


def close(actual, expected):
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


# transformers


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    """A folder as transformers writes it, and the network in it."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    folder = tmp_path_factory.mktemp("huggingface")
    names = dict(enumerate(["road", "tree", "sky", "car", "pole", "sign", "bike"]))
    network = randomise(SegformerForSemanticSegmentation(SegformerConfig(id2label=names)))
    network.save_pretrained(folder)
    processor = SegformerImageProcessor(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size={"height": 128, "width": 256}
    )
    processor.save_pretrained(folder)
    return folder, network


def test_huggingface_logits(huggingface):
    folder, theirs = huggingface
    ours, _ = load_segmenter(folder)
    with torch.no_grad():
        close(ours.eval()(IMAGE).logits, theirs(ours.normalise(IMAGE)).logits)


def test_huggingface_says_classes_normalisation_and_size(huggingface):
    ours, card = load_segmenter(huggingface[0])
    assert (ours.name, ours.num_classes) == ("segformer_b0", 7)
    assert card["class_names"] == ["road", "tree", "sky", "car", "pole", "sign", "bike"]
    assert ours.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert ours.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    transform = card["eval_transform"]["transform"]
    assert (transform["height"], transform["width"]) == (128, 256)


def test_huggingface_there_and_back_is_lossless(huggingface):
    file = safetensors.torch.load_file(huggingface[0] / "model.safetensors")
    kind, ours = rename_to_ours(file)
    back = rename_to_huggingface(ours)
    assert kind == "huggingface"
    assert back.keys() == file.keys()
    assert all(torch.equal(back[name], file[name]) for name in file)


@pytest.mark.parametrize("model", ["SegformerForImageClassification", "SegformerModel"])
def test_a_huggingface_encoder_leaves_the_head_and_a_chosen_normalisation(tmp_path, model, caplog):
    import transformers

    theirs = randomise(getattr(transformers, model)(transformers.SegformerConfig()))
    theirs.save_pretrained(tmp_path)
    transformers.SegformerImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        ours = create_segmenter("segformer_b0", num_classes=5, weights=tmp_path).eval()
    assert "only an encoder" in caplog.text
    assert ours.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    encoder = getattr(theirs, "segformer", theirs)
    with torch.no_grad():
        close(ours(IMAGE).features[3], encoder(ours.normalise(IMAGE)).last_hidden_state)
    chosen = create_segmenter("segformer_b0", num_classes=5, weights=tmp_path, mean=(0, 0, 0), std=(1, 1, 1))
    assert chosen.mean.flatten().tolist() == [0, 0, 0]


def test_do_normalize_false_feeds_the_image_as_it_is(huggingface, tmp_path):
    for file in huggingface[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_normalize": False}))
    ours, _ = load_segmenter(tmp_path)
    assert (ours.mean.flatten().tolist(), ours.std.flatten().tolist()) == ([0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize(
    ("front", "license"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: other\nlicense_name: nvidia-source-code", "nvidia-source-code"),
        ("license: other", None),
        ("tags: [x]", None),
    ],
)
def test_the_licence_is_that_of_the_model_card(huggingface, tmp_path, front, license):
    for file in huggingface[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A network\n")
    assert read_weights(tmp_path).lineage[-1]["license"] == license


# segmentation_models.pytorch


@pytest.fixture(scope="module")
def smp_network():
    smp = pytest.importorskip("segmentation_models_pytorch")
    return randomise(smp.Segformer("mit_b0", encoder_weights=None, classes=5))


@pytest.mark.parametrize("as_folder", [True, False])
def test_smp_logits(smp_network, tmp_path, as_folder):
    source = tmp_path / "network"
    if as_folder:
        smp_network.save_pretrained(source)
    else:
        torch.save(smp_network.state_dict(), source)
    ours, _ = load_segmenter(source)
    assert (ours.name, ours.num_classes) == ("segformer_b0", 5)
    with torch.no_grad():
        image = ours.normalise(IMAGE)
        expected = smp_network.segmentation_head[0](smp_network.decoder(smp_network.encoder(image)))
        close(ours.eval()(IMAGE).logits, expected)


def test_smps_licence_of_the_code_is_not_taken_for_that_of_the_weights(smp_network, tmp_path):
    smp_network.save_pretrained(tmp_path)
    assert "license: mit" in (tmp_path / "README.md").read_text()
    assert read_weights(tmp_path).lineage[-1]["license"] is None
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "encoder_weights": "imagenet"}))
    assert read_weights(tmp_path).lineage[-1]["license"] == NVIDIA


# timm


@pytest.mark.parametrize("name", ["pvt_v2_b0", "resnet18", "convnext_atto"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_timm_encoder(tmp_path, name, as_folder, caplog):
    theirs = randomise(timm.create_model(name))
    source = tmp_path / "encoder"
    if as_folder:
        timm.models.save_for_hf(theirs, source, safe_serialization=True)
    else:
        torch.save(theirs.state_dict(), source)
    with caplog.at_level(logging.INFO):
        ours = create_segmenter(name, num_classes=5, weights=source, head="fpn").eval()
    assert "only an encoder" in caplog.text
    with torch.no_grad():
        expected = theirs.forward_intermediates(ours.normalise(IMAGE), intermediates_only=True)[-4:]
        for feature, theirs_feature in zip(ours(IMAGE).features, expected, strict=True):
            close(feature, theirs_feature)


def test_a_timm_folder_says_its_normalisation_and_licence(tmp_path):
    theirs = timm.create_model("resnet18", pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "license": "apache-2.0"})
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    ours = create_segmenter("resnet18", num_classes=5, weights=tmp_path)
    assert ours.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert ours.lineage[-1]["license"] == "apache-2.0"


def test_another_timm_network_is_refused(tmp_path):
    timm.models.save_for_hf(timm.create_model("resnet18"), tmp_path, safe_serialization=True)
    with pytest.raises(UserError, match=r"does not fit resnet34.*missing in the file.*looks like a ResNet"):
        create_segmenter("resnet34", num_classes=5, weights=tmp_path)


# the SegFormer authors


def test_mmsegmentations_naming(tmp_path):
    torch.manual_seed(0)
    ours = randomise(create_segmenter("segformer_b0", num_classes=5))
    renamed = {}
    for name, tensor in ours.state_dict().items():
        renamed[name.replace("encoder.", "backbone.", 1).replace("head.", "decode_head.", 1)] = tensor
    renamed |= {"decode_head.conv_seg.weight": torch.zeros(5, 128, 1, 1), "decode_head.conv_seg.bias": torch.zeros(5)}
    torch.save({"meta": {"epoch": 3}, "state_dict": renamed}, tmp_path / "segformer.b0.pth")
    loaded, _ = load_segmenter(tmp_path / "segformer.b0.pth")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert loaded.lineage[-1]["license"] == NVIDIA


# What a file looks like


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("resnet18", "a ResNet"),
        ("swin_tiny_patch4_window7_224", "a Swin transformer"),
        ("vit_tiny_patch16_224", r"a plain vision transformer \(ViT\)"),
        ("convnext_atto", "a timm ConvNeXt"),
        ("pvt_v2_b0", "a timm PVTv2"),
    ],
)
def test_a_foreign_network_is_named(tmp_path, name, what):
    torch.save(timm.create_model(name).state_dict(), tmp_path / "foreign.pth")
    message = (
        r"foreign.pth does not fit segformer_b0 with 5 classes: encoder.patch_embed1.proj.weight: missing in the file;"
        rf".* and \d+ more\. It looks like {what}\. Choose"
    )
    with pytest.raises(UserError, match=message):
        create_segmenter("segformer_b0", num_classes=5, weights=tmp_path / "foreign.pth")


@pytest.mark.parametrize("name", [f"segformer_b{i}" for i in range(6)])
def test_every_segformer_is_recognised(name):
    with torch.device("meta"):
        tensors = create_segmenter(name, num_classes=7).state_dict()
    assert looks_like(tensors) == f"{name} with 7 classes"
    encoder = {key: tensor for key, tensor in tensors.items() if key.startswith("encoder.")}
    assert looks_like(encoder) == f"the encoder of {name}"


def test_nothing_is_made_up():
    assert looks_like({"a.weight": torch.zeros(1)}) is None

"""Teachers and students of every kind in whole runs, and what a pair that does not fit is told."""

import logging
import re

import pytest
import timm
import torch
from hydra.errors import InstantiationException
from runs import composed, results, student

from transkd.command.explaining import explain
from transkd.errors import UserError
from transkd.models import create_segmenter, load_segmenter, save_segmenter
from transkd.models.storage.sources import NVIDIA
from transkd.run import run

SHORT = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "pictures=0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def b0_file(root):
    """A SegFormer-B0 with the 19 classes of the data and random weights."""
    torch.manual_seed(1)
    path = root / "b0.safetensors"
    save_segmenter(create_segmenter("segformer_b0", num_classes=19), path)
    return path


def train(root, name, *overrides):
    run(composed(root, name, *SHORT, *overrides))
    return results(root, name)


PAIRS = {
    "segformer_lvt": ["student=lvt", "teacher=segformer_b0", "term=[csf,pea,cwd]"],
    "pvt_v2": ["student=pvt_v2_b0", "teacher=pvt_v2_b1", "term=[csf,ea]"],
    "swin": ["student=timm", "student.network.name=swin_tiny_patch4_window7_224", "teacher=segformer_b0", "term=[pea]"],
    "resnet_fpn": ["teacher=timm", "teacher.network.name=resnet18", "teacher.network.head=fpn", "term=[csf]"],
    "deeplab": [
        "teacher=timm",
        "teacher.network.name=resnet18",
        "teacher.network.head=deeplabv3plus",
        "teacher.network.encoder={output_stride:16}",
        "term=[csf,cwd]",
    ],
}


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs(root, pair):
    found = train(root, pair, "distill=none", *PAIRS[pair])
    assert len(found["terms"]) == 2 + PAIRS[pair][-1].count(",")
    assert found["teacher"]["teacher_name"]


def test_a_huggingface_folder_teaches(root, tmp_path):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    SegformerForSemanticSegmentation(SegformerConfig(num_labels=19)).save_pretrained(tmp_path)
    found = train(root, "huggingface", "distill=transkd_cwd", f"teacher.weights={tmp_path}")
    assert found["teacher"]["teacher_weights"] == str(tmp_path)


def test_any_module_teaches_and_learns(root):
    smp = "segmentation_models_pytorch.FPN"
    pytest.importorskip("segmentation_models_pytorch")
    resnet = f"{{_target_:{smp},encoder_name:resnet18,encoder_weights:null,classes:19}}"
    taps = "[encoder.layer1,encoder.layer2,encoder.layer3,encoder.layer4]"
    pair = []
    for who in ("student", "teacher"):
        pair += [f"{who}=module", f"{who}.network.module={resnet}", f"{who}.network.features={taps}"]
    found = train(root, "modules", *pair, "distill=none", "term=[csf,cwd]")
    assert found["teacher"]["teacher_name"] == "FPN"
    import segmentation_models_pytorch

    bare = segmentation_models_pytorch.FPN("resnet18", encoder_weights=None, classes=19)
    bare.load_state_dict(student(root, "modules"), strict=True)


@pytest.mark.slow
def test_the_student_can_start_as_a_copy_of_the_teacher(root, b0_file, caplog):
    caplog.set_level(logging.INFO)
    settings = ["student.from_teacher=copy", f"teacher.weights={b0_file}", "optim.optimizer.lr=0"]
    train(root, "warm", "distill=transkd_base", *settings)
    teacher = load_segmenter(b0_file)[0].state_dict()
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in student(root, "warm").items() if "bn" not in name)
    train(root, "alone", "distill=none", *settings)  # the teacher is read for the start alone
    start = results(root, "alone")["start"]
    assert start["how"] == "copy"
    assert start["agreement"] == 1.0
    assert start["mIoU"] == results(root, "alone")["teacher"]["mIoU"]
    with pytest.raises(UserError, match=r"student.from_teacher: encoder\S+ is \[32, .* in segformer_b0 and \[64"):
        train(root, "wider", "distill=transkd_base", "student.from_teacher=copy", "teacher=segformer_b1")


@pytest.mark.parametrize("how", ["solve", "select", "true"])
def test_a_smaller_student_starts_from_its_teacher(root, b0_file, caplog, how):
    caplog.set_level(logging.INFO)
    smaller = ["+student.network.encoder.channels=[16,32,80,128]", "+student.network.encoder.depths=[1,1,2,1]"]
    settings = [f"student.from_teacher={how}", f"teacher.weights={b0_file}", "student.solve.images=4", "distill=none"]
    train(root, f"from_{how}", *settings, *smaller, "trainer.max_epochs=1")
    start = results(root, f"from_{how}")["start"]
    assert start["how"] == ("select" if how == "select" else "solve")
    assert start["images"] == 4
    assert len(start["feature_errors"]) == 4
    assert 0 <= start["agreement"] <= 1
    assert 0 <= start["mIoU"] <= 1
    assert start["seconds"] > 0
    assert "before any step (full-res)" in caplog.text


@pytest.mark.slow
def test_raw_features_of_a_teacher_are_brought_to_the_usual_scale(root, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    teacher = create_segmenter("resnet18", num_classes=19, head="fpn", width=64)
    teacher.encoder.body.conv1.weight.data.mul_(30)  # no norm of its own at the end of a stage
    for module in teacher.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.mul_(4)
    save_segmenter(teacher, tmp_path / "raw.safetensors")
    settings = [
        "teacher=timm",
        "teacher.network.name=resnet18",
        "teacher.network.head=fpn",
        "+teacher.network.width=64",
    ]
    settings += [
        f"teacher.weights={tmp_path / 'raw.safetensors'}",
        "distill=none",
        "term=[csf]",
        "student.solve.images=4",
    ]
    train(root, "raw", *settings, "trainer.max_epochs=1")
    assert "teacher: features are standardised per channel" in caplog.text
    caplog.clear()
    train(root, "left", *settings, "trainer.max_epochs=1", "teacher.standardise=false")
    assert "standardised" not in caplog.text


def test_a_student_that_cannot_start_from_its_teacher_is_one_line(root, b0_file):
    settings = ["student.from_teacher=solve", f"teacher.weights={b0_file}", "distill=none", "student.solve.images=4"]
    with pytest.raises(UserError, match=r"cannot solve lvt .* from segformer_b0 .*expected two networks of one family"):
        train(root, "lvt", *settings, "student=lvt")
    with pytest.raises(UserError, match=r"student\.solve\.folder=nowhere"):
        train(
            root,
            "nowhere",
            *settings,
            "+student.network.encoder.channels=[16,32,80,128]",
            "student.solve.folder=nowhere",
        )


def test_a_teacher_of_other_classes_teaches_features(root, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_segmenter(create_segmenter("segformer_b0", num_classes=7), tmp_path / "seven.safetensors")
    settings = [f"teacher.weights={tmp_path / 'seven.safetensors'}", "teacher.network.num_classes=7"]
    train(root, "seven", "distill=transkd_base", *settings)
    assert "not evaluated, since it has 7 classes and the data 19" in caplog.text
    with pytest.raises(UserError, match=r"compares logits, but the teacher segformer_b0 has 7 classes and the data 19"):
        train(root, "seven_logits", "distill=transkd_cwd", *settings)


def test_weights_for_other_classes_need_a_word(root, tmp_path):
    save_segmenter(create_segmenter("segformer_b0", num_classes=7), tmp_path / "seven.safetensors")
    settings = ["distill=none", f"student.weights={tmp_path / 'seven.safetensors'}"]
    with pytest.raises(UserError, match=r"has 7 classes.*student.classifier=new"):
        train(root, "strict", *settings)
    train(root, "new", *settings, "student.classifier=new")


# What does not fit shows before anything long begins: no teacher is trained, no folder filled.


def refused(root, name, message, *overrides):
    with pytest.raises((UserError, InstantiationException)) as caught:
        train(root, name, *overrides)
    said = explain(caught.value)
    assert re.search(message, said)
    assert "\n" not in said
    assert not (root / name / "metrics.csv").exists()
    assert not (root / name / "checkpoints").exists()


def test_a_teacher_without_patch_embeddings(root, caplog):
    caplog.set_level(logging.INFO)
    message = (
        r"Term 'pea': PEALoss compares embeddings, but the teacher returns none: choose a term that reads features"
    )
    pair = ["teacher=timm", "teacher.network.name=resnet18", "distill=transkd_base"]
    refused(root, "no_embeddings", message, *pair)
    assert "teacher:" not in caplog.text


def test_strides_that_a_term_cannot_align(root):
    """Twins rounds a stage's size down where MiT rounds up."""
    odd = [f"data.{part}=48" for part in ("prepare.height", "train_transform.transforms.0.height")]
    message = (
        r"'pea': PEALoss pairs patch embeddings position by position, but stage 4 has 4 tokens.*and 2 in the teacher"
    )
    pair = ["teacher=timm", "teacher.network.name=twins_svt_small", "distill=transkd_base", f"data.root={root / 'odd'}"]
    refused(root, "strides", message, *pair, *odd)


def test_a_network_of_fixed_size(root):
    message = r"hiera_tiny_224 does not accept an image of 32×64, .*img_size"
    refused(root, "fixed", message, "student=timm", "student.network.name=hiera_tiny_224", "distill=none")


def test_a_network_without_four_stages(root):
    message = r"vit_tiny_patch16_224 has stages at strides \[16, 16, 16\]; expected 4 of them, the first at stride 4"
    refused(root, "vit", message, "student=timm", "student.network.name=vit_tiny_patch16_224", "distill=none")


# Licences


def test_a_commercial_policy_refuses_non_commercial_weights(root, b0_file, tmp_path):
    torch.save({f"student.{n.split('.', 1)[1]}": t for n, t in load_segmenter(b0_file)[0].state_dict().items()},
               tmp_path / "best.pth")  # fmt: skip
    message = r"license_policy=commercial refuses the {} segformer_b0: weights: \S+best.pth, .*NVIDIA.*Start from"
    commercial = ["license_policy=commercial"]
    theirs = f"student.weights={tmp_path / 'best.pth'}"
    refused(root, "nc_student", message.format("student"), "distill=none", theirs, *commercial)
    teacher = [f"teacher.weights={tmp_path / 'best.pth'}", "distill=transkd_base"]
    refused(root, "nc_teacher", message.format("teacher"), *teacher, *commercial)
    train(root, "licensed", "distill=none", theirs, "student.license=Apache-2.0", *commercial)


def test_the_students_file_names_its_teachers_origin(root, b0_file, tmp_path):
    network = load_segmenter(b0_file)[0]
    network.lineage = [{"part": "weights", "source": "mit_b0.pth", "license": NVIDIA}]
    save_segmenter(network, tmp_path / "teacher.safetensors")
    train(root, "lineage", "distill=transkd_base", f"teacher.weights={tmp_path / 'teacher.safetensors'}")
    lineage = load_segmenter(root / "lineage" / "student.safetensors")[0].lineage
    assert {"part": "teacher", "source": "mit_b0.pth", "license": NVIDIA} in lineage
    assert {"part": "weights", "source": "random initialisation", "license": "none needed"} in lineage
    assert lineage[0] == {"part": "code", "source": "transkd", "license": "Apache-2.0"}


def test_a_timm_encoder_from_a_folder(root, tmp_path):
    timm.models.save_for_hf(timm.create_model("pvt_v2_b0"), tmp_path, safe_serialization=True)
    train(root, "timm", "distill=none", "student=pvt_v2_b0", f"student.weights={tmp_path}")

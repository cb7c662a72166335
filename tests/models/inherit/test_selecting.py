import logging

import pytest
import torch

from transkd.errors import UserError
from transkd.models import create_segmenter, inherit
from transkd.models.inherit.selecting import start_from_subset

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def network(channels=(8, 16, 40, 64), depths=(1, 1, 1, 1), classes=5, width=24, name="segformer_b0", **encoder):
    torch.manual_seed(sum(channels))
    encoder = {"channels": list(channels), "depths": list(depths), **encoder} if name == "segformer_b0" else encoder
    return create_segmenter(name, classes, width=width, encoder=encoder).eval()


def test_evenly_spaced_along_every_dimension():
    teacher, student = network(), network((4, 8, 20, 32), width=8)
    start_from_subset(student, teacher)
    theirs, ours = teacher.state_dict(), student.state_dict()
    assert torch.equal(ours["encoder.patch_embed2.proj.weight"], theirs["encoder.patch_embed2.proj.weight"][::2, ::2])
    assert torch.equal(ours["encoder.block2.0.attn.sr.weight"], theirs["encoder.block2.0.attn.sr.weight"][::2, ::2])
    assert torch.equal(ours["head.linear_pred.weight"], theirs["head.linear_pred.weight"][:, ::3])
    assert torch.equal(ours["head.linear_fuse.bn.running_var"], theirs["head.linear_fuse.bn.running_var"][::3])


def test_a_third_by_hand():
    """Of 8 channels 3: 0·8//3, 1·8//3, 2·8//3."""
    teacher, student = network(), network((3, 16, 40, 64))
    start_from_subset(student, teacher)
    assert torch.equal(student.encoder.norm1.weight, teacher.encoder.norm1.weight[[0, 2, 5]])
    weight = teacher.encoder.patch_embed2.proj.weight
    assert torch.equal(student.encoder.patch_embed2.proj.weight, weight[:, [0, 2, 5]])


def test_joined_tensors_take_as_many_of_each_part():
    """Keys and values of each head, and the four maps of the fusing convolution, are told apart in the student too."""
    teacher, student = network(heads=(2, 2, 5, 8)), network((4, 8, 20, 32), width=8, heads=(2, 2, 5, 8))
    with torch.no_grad():
        for i, (heads, width) in enumerate(zip((2, 2, 5, 8), (4, 8, 8, 8), strict=True), start=1):
            attention = teacher.encoder.get_submodule(f"block{i}.0.attn")
            attention.kv.bias.copy_(torch.arange(2 * heads).repeat_interleave(width))  # part and head of each row
            attention.q.bias.copy_(torch.arange(heads).repeat_interleave(width))
        teacher.head.linear_fuse.conv.weight.copy_(torch.arange(4).repeat_interleave(24)[None, :, None, None])
    start_from_subset(student, teacher)
    for i, (heads, width) in enumerate(zip((2, 2, 5, 8), (2, 4, 4, 4), strict=True), start=1):
        attention = student.encoder.get_submodule(f"block{i}.0.attn")
        assert attention.kv.bias.tolist() == torch.arange(2 * heads).repeat_interleave(width).tolist()
        assert attention.q.bias.tolist() == torch.arange(heads).repeat_interleave(width).tolist()
    assert student.head.linear_fuse.conv.weight[0].flatten().tolist() == [0.0] * 8 + [1.0] * 8 + [2.0] * 8 + [3.0] * 8


def test_blocks_as_copy_takes_them():
    teacher, student = network(depths=(1, 1, 4, 1)), network((4, 8, 20, 32), depths=(1, 1, 2, 1))
    start_from_subset(student, teacher)
    for j, k in enumerate((0, 2)):
        mine, its = student.encoder.block3[j].mlp.fc1.weight, teacher.encoder.block3[k].mlp.fc1.weight
        assert torch.equal(mine, its[::2, ::2])


def test_any_network_whose_parameters_correspond():
    teacher, student = network(name="lvt"), network(name="lvt", channels=(), width=8)
    small = create_segmenter("lvt", 5, width=8, encoder={"channels": [32, 32, 80, 128]})
    start_from_subset(small, teacher)
    weight = teacher.encoder.block1[0].attn.value.weight
    assert torch.equal(small.encoder.block1[0].attn.value.weight, weight[::2, ::2])
    start_from_subset(student, teacher)
    assert torch.equal(student.encoder.block4[1].attn.proj.weight, teacher.encoder.block4[1].attn.proj.weight)


def test_normalisation_lineage_and_report():
    teacher, student = network(), network((4, 8, 20, 32))
    teacher.mean.fill_(0.2)
    report = inherit(teacher, student, IMAGES, "select", progress=False)
    assert torch.equal(student.mean, teacher.mean)
    assert (report.how, report.images, len(report.feature_errors)) == ("select", 2, 4)
    assert inherit(teacher, student, None, "select", progress=False).feature_errors == ()


def test_other_classes_leave_the_classifier_as_it_was(caplog):
    teacher, student = network(classes=7), network((4, 8, 20, 32))
    before = student.head.linear_pred.weight.clone()
    with caplog.at_level(logging.INFO, "transkd"):
        start_from_subset(student, teacher)
    assert torch.equal(student.head.linear_pred.weight, before)
    assert "select: the classes differ, 7 and 5; the classifier starts from random weights" in caplog.messages


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"channels": (8, 16, 40, 72)}, r"encoder\.patch_embed4\.proj\.weight is \[72, .*\] in .* and \[64, .*\] in"),
        ({"depths": (1, 2, 1, 1)}, r"encoder\.block2\.1\.norm1\.weight is \[16\] in .* and missing in"),
        ({"width": 32}, r"head\.linear_c1\.proj\.weight is \[32, 8\] in .* and \[24, 8\] in"),
    ],
)
def test_a_student_larger_than_its_teacher_is_refused(student, message):
    student = network(**student)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(UserError, match=rf"^select: {message}.*such as segformer_b0 of segformer_b1") as caught:
        start_from_subset(student, network())
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())

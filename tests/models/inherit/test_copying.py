import copy
import logging

import pytest
import torch

from transkd.errors import UserError
from transkd.models import (
    MixTransformer,
    SegformerHead,
    Segmenter,
    SemanticFPNHead,
    TimmEncoder,
    create_segmenter,
)
from transkd.models.initialise import start_from_teacher
from transkd.models.storage.lineage import CODE, RANDOM

WIDTHS = (8, 16, 24, 32)
IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def randomise(network, seed):
    """No tensor stays as a layer starts it, so that any two of one shape differ."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.1)
        else:
            tensor.fill_(seed)
    return network.eval()


def mit(depths, seed, width=12, classes=5, head=SegformerHead, channels=WIDTHS):
    encoder = MixTransformer(channels=channels, heads=(1, 2, 3, 4), depths=depths, num_classes=0)
    network = randomise(Segmenter(encoder, head(channels, width, classes), classes), seed)
    network.name, network.lineage = f"mit of depths {depths}", [CODE, RANDOM]
    return network


def pvt(depths, seed):
    encoder = TimmEncoder("pvt_v2_b0", depths=depths)
    return randomise(Segmenter(encoder, SegformerHead(encoder.channels, 12, 5), 5), seed)


def state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def part(network, name):
    return network.get_submodule(name).state_dict()


# d_t blocks, d_s of the student, and those that it takes, by hand: every ⌈d_t / d_s⌉-th where that gives d_s of them
BLOCKS = [
    (4, 2, [0, 2]),
    (6, 2, [0, 3]),
    (3, 2, [0, 2]),
    (6, 3, [0, 2, 4]),
    (5, 3, [0, 2, 4]),
    (8, 3, [0, 3, 6]),
    (7, 4, [0, 2, 4, 6]),
    (5, 1, [0]),
    (3, 3, [0, 1, 2]),
    (4, 3, [0, 1, 2]),  # no ratio gives 3 of 4, nor those below: j·d_t // d_s
    (5, 4, [0, 1, 2, 3]),
    (9, 4, [0, 2, 4, 6]),
    (6, 5, [0, 1, 2, 3, 4]),
]


@pytest.mark.parametrize(("teachers", "students", "taken"), BLOCKS)
def test_blocks_of_mit(teachers, students, taken):
    teacher, student = mit((1, 1, teachers, 1), 1), mit((1, 1, students, 1), 2)
    start_from_teacher(student, teacher)
    for j, k in enumerate(taken):
        assert same(part(student, f"encoder.block3.{j}"), part(teacher, f"encoder.block3.{k}"))
    others = [name for name in teacher.state_dict() if not name.startswith("encoder.block3.")]
    assert all(torch.equal(student.state_dict()[name], teacher.state_dict()[name]) for name in others)
    assert len(others) > 50


@pytest.mark.parametrize(("teachers", "students", "taken"), BLOCKS[:4])
def test_blocks_of_pvt(teachers, students, taken):
    teacher, student = pvt((1, 1, teachers, 1), 1), pvt((1, 1, students, 1), 2)
    start_from_teacher(student, teacher)
    for j, k in enumerate(taken):
        mine, its = (f"encoder.body.stages_2.blocks.{i}" for i in (j, k))
        assert same(part(student, mine), part(teacher, its))
    for name in ("patch_embed", "stages_0", "stages_1", "stages_2.downsample", "stages_2.norm", "stages_3"):
        assert same(part(student, f"encoder.body.{name}"), part(teacher, f"encoder.body.{name}"))
    assert same(part(student, "head"), part(teacher, "head"))


def test_several_stages_at_once():
    """MiT-B2's depths, to every second block and to those of MiT-B1."""
    teacher = mit((3, 4, 6, 3), 1)
    check_stages(teacher, mit((2, 2, 3, 2), 2), [(0, 2), (0, 2), (0, 2, 4), (0, 2)])
    check_stages(teacher, mit((2, 2, 2, 2), 2), [(0, 2), (0, 2), (0, 3), (0, 2)])


def check_stages(teacher, student, expected):
    start_from_teacher(student, teacher)
    for stage, taken in enumerate(expected, start=1):
        assert len(student.encoder.get_submodule(f"block{stage}")) == len(taken)
        for j, k in enumerate(taken):
            assert same(part(student, f"encoder.block{stage}.{j}"), part(teacher, f"encoder.block{stage}.{k}"))


def test_layers_and_statistics_of_a_resnet():
    def resnet(layers, seed):
        encoder = TimmEncoder("resnet18", layers=layers)
        return randomise(Segmenter(encoder, SegformerHead(encoder.channels, 8, 5), 5), seed)

    teacher, student = resnet((1, 3, 1, 1), 1), resnet((1, 2, 1, 1), 2)
    start_from_teacher(student, teacher)
    for j, k in enumerate([0, 2]):
        mine, its = (f"encoder.body.layer2.{i}" for i in (j, k))
        assert same(part(student, mine), part(teacher, its))
        assert "bn1.running_mean" in part(student, mine)


@pytest.mark.parametrize("make", [mit, pvt])
def test_a_student_of_the_same_depth_becomes_its_teacher(make):
    teacher, student = make((1, 2, 1, 1), 1), make((1, 2, 1, 1), 2)
    start_from_teacher(student, teacher)
    assert same(state(student), state(teacher))
    with torch.no_grad():
        assert torch.equal(student(IMAGE).logits, teacher(IMAGE).logits)


def test_the_weights_bring_the_normalisation_that_they_know():
    teacher, student = mit((1, 1, 1, 1), 1), mit((1, 1, 1, 1), 2)
    teacher.mean.fill_(0.0)
    teacher.std.fill_(1.0)
    start_from_teacher(student, teacher)
    assert torch.equal(student.mean, teacher.mean)
    assert torch.equal(student.std, teacher.std)
    assert student.mean is not teacher.mean


def test_the_teacher_stays_as_it_is_and_shares_nothing():
    teacher, student = mit((2, 1, 1, 1), 1), mit((1, 1, 1, 1), 2)
    before = state(teacher)
    start_from_teacher(student, teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert same(state(teacher), before)
    assert teacher.lineage == [CODE, RANDOM]


def test_the_student_keeps_its_type_and_its_parameters():
    teacher, student = mit((2, 1, 1, 1), 1), mit((1, 1, 1, 1), 2).double()
    parameters = list(student.parameters())
    start_from_teacher(student, teacher)
    assert all(mine is still for mine, still in zip(parameters, student.parameters(), strict=True))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float64}
    assert torch.equal(student.encoder.norm1.weight.float(), teacher.encoder.norm1.weight)


@pytest.mark.parametrize(
    "different", [{"width": 16}, {"classes": 7}, {"head": SemanticFPNHead}], ids=["width", "classes", "kind"]
)
def test_a_head_of_another_size_stays_as_it_is(different, caplog):
    teacher, student = mit((2, 1, 1, 1), 1, **different), mit((1, 1, 1, 1), 2)
    head = copy.deepcopy(part(student, "head"))
    with caplog.at_level(logging.INFO, "transkd"):
        start_from_teacher(student, teacher)
    assert same(part(student, "head"), head)
    assert same(part(student, "encoder.block1.0"), part(teacher, "encoder.block1.0"))
    assert "the decode heads differ in size; the student's starts from random weights" in caplog.text


def test_the_log_tells_the_blocks(caplog):
    with caplog.at_level(logging.INFO, "transkd"):
        start_from_teacher(mit((2, 1, 3, 1), 1), mit((5, 1, 6, 1), 2))
    assert caplog.messages == [
        "student.from_teacher: encoder.block1 takes the teacher's blocks [0, 3] of 5",
        "student.from_teacher: encoder.block3 takes the teacher's blocks [0, 2, 4] of 6",
    ]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            {"depths": (1, 2, 1, 1), "channels": (8, 16, 24, 48)},
            r"encoder\.patch_embed4\.proj\.weight is \[32, 24, 3, 3\] in .* and \[48, 24, 3, 3\] in ",
        ),
        ({"depths": (1, 1, 1, 1)}, r"encoder\.block2\.1\..* is \[16\] in .* and missing in "),
        ({"depths": (4, 1, 1, 1)}, r"encoder\.block2\.1\..* is \[16\] in .* and missing in "),
    ],
    ids=["other widths", "deeper student", "one stage deeper, another not"],
)
def test_what_does_not_fit_is_refused_and_the_student_untouched(teacher, message):
    student, teacher = mit((1, 2, 1, 1), 2), mit(seed=1, **teacher)
    before, mean = state(student), student.mean.clone()
    with pytest.raises(UserError, match=rf"^student\.from_teacher: {message}.*at least as deep") as caught:
        start_from_teacher(student, teacher)
    assert "\n" not in str(caught.value)
    assert student.name in str(caught.value)
    assert teacher.name in str(caught.value)
    assert same(state(student), before)
    assert torch.equal(student.mean, mean)
    assert student.lineage == [CODE, RANDOM]


def test_other_kinds_of_encoders_are_refused():
    student = pvt((1, 1, 1, 1), 2)
    before = state(student)
    with pytest.raises(UserError, match=r"missing in mit.* of the same kind"):
        start_from_teacher(student, mit((1, 1, 1, 1), 1, channels=(*student.channels[:2], 159, 256)))
    assert same(state(student), before)


def test_lineages_are_merged():
    teacher, student = mit((1, 1, 1, 1), 1), mit((1, 1, 1, 1), 2)
    weights = {"part": "weights", "source": "b2.pth", "license": "other"}
    teacher.lineage = [CODE, weights]
    start_from_teacher(student, teacher)
    assert student.lineage == [CODE, RANDOM, weights]


@pytest.mark.parametrize(("small", "large"), [("segformer_b1", "segformer_b3"), ("pvt_v2_b1", "pvt_v2_b4")])
def test_named_networks_pair_up(small, large):
    with torch.device("meta"):
        start_from_teacher(create_segmenter(small, 19), create_segmenter(large, 19))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("segformer_b0", "segformer_b1"), ("segformer_b2", "segformer_b1"), ("lvt", "segformer_b0")],
)
def test_named_networks_that_do_not(student, teacher):
    with torch.device("meta"):
        student, teacher = create_segmenter(student, 19), create_segmenter(teacher, 19)
    with pytest.raises(UserError, match=f"in {student.name} and .* in {teacher.name}"):
        start_from_teacher(student, teacher)

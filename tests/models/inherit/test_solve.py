import json
import logging

import pytest
import torch
import torch.nn.functional as F

from transkd.errors import UserError
from transkd.models import InheritReport, create_segmenter, inherit


def smooth_images(count, height, width, seed=0):
    """Noise would fill every channel of any network; patches of colour do not."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(height, width), mode="bilinear")


IMAGES = smooth_images(6, 64, 96)
WIDE, NARROW = [8, 16, 40, 64], [4, 8, 20, 32]


def network(name="segformer_b0", seed=0, classes=5, width=16, head=None, **encoder):
    torch.manual_seed(seed)
    built = create_segmenter(name, classes, width=width, head=head, encoder=encoder).eval()
    with torch.no_grad():  # as after some training: every bias, gain and statistic is its own
        for key, tensor in built.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.2 * torch.rand_like(tensor))
            elif "attn" in key or "mlp" in key:
                tensor.mul_(3)
    return built


def mit(channels=WIDE, depths=(1, 1, 1, 1), seed=0, **more):
    return network(channels=channels, depths=list(depths), seed=seed, **more)


def pvt(channels=WIDE, depths=(1, 1, 1, 1), seed=0, head="fpn", width=64, **more):
    return network("pvt_v2_b0", seed, width=width, head=head, embed_dims=channels, depths=list(depths), **more)


def solve(teacher, student, images=IMAGES, how="solve", **more):
    return inherit(teacher, student, images, how, **{"mirror": False, "progress": False, **more})


def logits(network, images=IMAGES):
    with torch.no_grad():
        return network.eval()(images).logits


def state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "make", [lambda seed: mit(depths=(2, 1, 1, 2), seed=seed), lambda seed: pvt(seed=seed)], ids=["mit", "pvt"]
)
def test_a_student_as_large_as_its_teacher_equals_it(make):
    teacher, student = make(1), make(2)
    report = solve(teacher, student)
    other = smooth_images(2, 96, 64, seed=1)
    torch.testing.assert_close(logits(student, other), logits(teacher, other), atol=1e-3, rtol=0)
    assert max(report.feature_errors) < 1e-6
    assert report.agreement > 0.999


def test_stages_as_wide_as_the_teachers_up_to_the_first_narrower_one_are_exact():
    teacher, student = mit(seed=1), mit([8, 16, 20, 32], seed=2)
    report = solve(teacher, student)
    assert max(report.feature_errors[:2]) < 1e-6
    assert min(report.feature_errors[2:]) > 1e-6
    for name in ("encoder.block1.0.attn.q.weight", "encoder.block2.0.mlp.fc1.weight", "encoder.norm2.bias"):
        torch.testing.assert_close(student.state_dict()[name], teacher.state_dict()[name], atol=1e-4, rtol=1e-3)


def test_a_narrower_student_is_nearer_than_a_subset_of_the_weights():
    teacher = mit(seed=1)
    solved, selected = solve(teacher, mit(NARROW, seed=2)), solve(teacher, mit(NARROW, seed=2), how="select")
    assert solved.how, selected.how == ("solve", "select")
    assert all(mine < its for mine, its in zip(solved.feature_errors, selected.feature_errors, strict=True))
    assert 1 - solved.agreement < 0.5 * (1 - selected.agreement)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (mit(depths=(2, 3, 1, 2)), mit(NARROW, (1, 2, 1, 1), 1)),
        (mit(heads=(1, 2, 5, 8)), mit(NARROW, seed=1, heads=(1, 1, 2, 4))),
        (mit(heads=(1, 1, 2, 2)), mit(NARROW, seed=1, heads=(2, 2, 5, 8))),
        (mit([8, 16, 40, 66], heads=(1, 2, 5, 6)), mit([6, 12, 25, 36], seed=1, heads=(1, 3, 5, 4))),
        (mit(width=24), mit(NARROW, seed=1, width=16)),
        (mit(mlp_ratio=4), mit(NARROW, seed=1, mlp_ratio=2)),
        (pvt(), pvt(NARROW, seed=1)),
        (pvt(depths=(2, 1, 2, 1), head="segformer", width=16), pvt(NARROW, seed=1, head="segformer", width=12)),
        (mit(head="deeplabv3plus", width=32), mit(NARROW, seed=1, head="deeplabv3plus", width=32)),
    ],
    ids=["depth", "fewer heads", "more heads", "odd", "head width", "mlp ratio", "pvt", "pvt segformer", "deeplab"],
)
def test_whatever_differs_the_student_comes_near_its_teacher(teacher, student):
    start, target = logits(student), logits(teacher)
    report = solve(teacher, student)
    variance = (target - target.mean((0, 2, 3), keepdim=True)).square().sum()
    assert (logits(student) - target).square().sum() < 0.5 * variance
    assert (logits(student) - target).square().sum() < 0.5 * (start - target).square().sum()
    assert all(0 <= error < 0.9 for error in report.feature_errors)


def test_the_seed_and_the_images_decide():
    def solved(**more):
        student = mit(NARROW, seed=2)
        solve(mit(seed=1), student, **more)
        return state(student)

    first = solved()
    torch.manual_seed(123)
    assert same(first, solved())
    assert not same(first, solved(seed=1))
    assert not same(first, solved(images=IMAGES[:5]))


@pytest.mark.parametrize(
    "images",
    [
        (IMAGES * 255).byte(),
        list((IMAGES * 255).byte()),
        list((IMAGES * 255).byte().split(4)),
        [IMAGES[0], IMAGES[1], IMAGES[2, :, :, :64]],
    ],
    ids=["uint8", "list", "batches", "two sizes"],
)
def test_images_come_in_many_ways(images):
    report = solve(mit(seed=1), mit(NARROW, seed=2), images)
    assert report.images == (6 if len(images) != 3 else 3)


def test_the_teacher_stays_as_it_is_and_gives_its_normalisation_and_lineage():
    teacher, student = mit(seed=1).train(), mit(NARROW, seed=2).train()
    teacher.mean.fill_(0.3)
    teacher.std.fill_(0.7)
    teacher.lineage = [*teacher.lineage, {"part": "weights", "source": "b1.pth", "license": "other"}]
    before = state(teacher)
    parameters = list(student.parameters())
    solve(teacher, student)
    assert same(state(teacher), before)
    assert teacher.training
    assert student.training
    assert torch.equal(student.mean, teacher.mean)
    assert torch.equal(student.std, teacher.std)
    assert student.lineage[-1]["source"] == "b1.pth"
    assert all(mine is still for mine, still in zip(parameters, student.parameters(), strict=True))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)


def test_every_weight_of_the_student_can_go_on_learning():
    """No layer is left at 0 on both sides of a product, where no gradient would reach it."""
    student = mit(NARROW, seed=2, heads=(1, 1, 1, 1))  # wider heads than the teacher's: some channels have no model
    solve(mit(seed=1, heads=(2, 4, 5, 8)), student)
    student.train()(IMAGES).logits.square().sum().backward()
    for name, parameter in student.named_parameters():
        rows = parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None]
        if "attn.q" not in name and "attn.kv.bias" not in name and not name.endswith("norm.bias"):
            assert (rows.abs().sum(1) > 0).float().mean() > 0.5, name


def test_the_report():
    report = solve(mit(seed=1), mit(NARROW, seed=2))
    assert (report.how, report.images, len(report.feature_errors)) == ("solve", 6, 4)
    assert 0 < report.seconds < 60
    assert 0 < report.agreement <= 1
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert InheritReport("copy", 0, 1.23456).as_dict() == {
        "how": "copy", "images": 0, "seconds": 1.23, "feature_errors": [], "agreement": None, "warnings": [],
    }  # fmt: skip


def test_agreement_by_hand():
    """A student that is its teacher with two classes' biases raised is told apart by its own argmax."""
    teacher, student = mit(seed=1), mit(seed=1)
    report = inherit(teacher, student, IMAGES, "copy", progress=False)
    assert report.agreement == 1
    assert max(report.feature_errors) < 1e-6


def test_other_classes_leave_the_classifier_as_it_was(caplog):
    teacher, student = mit(seed=1, classes=7), mit(NARROW, seed=2)
    before = student.head.linear_pred.weight.clone()
    with caplog.at_level(logging.WARNING, "transkd"):
        report = solve(teacher, student)
    assert torch.equal(student.head.linear_pred.weight, before)
    assert report.agreement is None
    assert max(report.feature_errors) < 0.9
    message = "the teacher has 7 classes, the student 5; the classifier starts from random weights"
    assert message in report.warnings
    assert f"inherit: {message}" in caplog.messages


def test_too_few_images_are_said_once(caplog):
    with caplog.at_level(logging.WARNING, "transkd"):
        report = solve(mit(seed=1), mit(NARROW, seed=2), IMAGES[:1])
    (message,) = report.warnings
    assert caplog.messages == [f"inherit: {message}"]
    assert "image positions for" in message
    assert "images than 1" in message


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (mit(), pvt(NARROW), r"cannot solve pvt_v2_b0 .*pvt_v2_b0.* from segformer_b0 .*MixTransformer.*how='select'"),
        (network("resnet18"), network("resnet18"), r"expected two networks of one family, MiT .* or PVTv2"),
        (mit(NARROW), mit(WIDE), r"stage 1 has 8 channels in the student and 4 in the teacher; expected at most"),
        (mit(), mit(NARROW, (1, 2, 1, 1)), r"stage 2 has 2 blocks in the student and 1 in the teacher"),
        (mit(), mit(NARROW, mlp_ratio=12), r"stage 1 has 48 hidden units in the student and 32 in the teacher"),
        (mit(), mit(NARROW, reductions=(4, 4, 2, 1)), r"key/value reduction of stage 1 is \(4, 4\) .* and \(8, 8\)"),
        (mit(width=16), mit(NARROW, width=32), r"decode head has 32 channels, the teacher's 16.*width=16"),
        (pvt(), mit(NARROW, head="fpn", width=64), r"expected two networks of one family"),
        (pvt(), pvt(NARROW, width=128), r"head\.pyramid\..* gives 128 channels in the student and 64 in the teacher"),
        (pvt(), pvt(NARROW, head="segformer"), r"decode head is a SegformerHead, the teacher's a SemanticFPNHead"),
    ],
)
def test_networks_that_do_not_correspond(teacher, student, expected):
    before = state(student)
    with pytest.raises(UserError, match=rf"^solve: .*{expected}") as caught:
        solve(teacher, student)
    assert "\n" not in str(caught.value)
    assert same(state(student), before)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (None, r"images \[N, 3, H, W\], got none"),
        (IMAGES[:0], r"got none"),
        (IMAGES[:, :, :31], r"of at least 32×32 pixels, got \[6, 3, 31, 96\].*Resize or pad"),
        (IMAGES[:, :1], r"got \[6, 1, 64, 96\]"),
    ],
)
def test_images_that_do_not_do(images, expected):
    with pytest.raises(UserError, match=rf"^inherit: expected .*{expected}"):
        solve(mit(), mit(NARROW), images)


def test_nan_in_the_teachers_weights_or_images():
    teacher, student = mit(seed=1), mit(NARROW, seed=2)
    before = state(student)
    images = IMAGES.clone()
    images[2, 0, 5, 5] = float("nan")
    with pytest.raises(
        UserError, match=r"^inherit: expected images of finite numbers in \[0, 1\], got NaN or infinity"
    ):
        solve(teacher, student, images)
    with torch.no_grad():
        teacher.encoder.block2[0].attn.kv.weight[3] = float("nan")
    with pytest.raises(
        UserError, match=r"encoder\.block2\.0\.attn\.kv\.weight of the teacher .* holds NaN or infinity"
    ):
        solve(teacher, student)
    assert same(state(student), before)


def test_an_unknown_way():
    with pytest.raises(UserError, match="unknown way to inherit 'solv'; there are: solve, copy, select, best"):
        inherit(mit(), mit(NARROW), IMAGES, "solv")


@pytest.mark.parametrize(
    ("teacher", "student", "images", "how"),
    [
        (mit(), mit(NARROW), IMAGES, "solve"),
        (mit(), mit(), None, "copy"),
        (mit(), mit(NARROW), None, "select"),
        (network("resnet18"), network("resnet18"), IMAGES, "copy"),
    ],
)
def test_the_best_that_fits(teacher, student, images, how):
    assert solve(teacher, student, images, how="best").how == how


def test_nothing_fits():
    with pytest.raises(
        UserError, match=r"^no way to start pvt_v2_b0 from segformer_b0\. solve: .*from_teacher: .*select: "
    ):
        solve(mit(), pvt(), how="best")

import copy

import golden
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from drawn import CLASSES, STUDENT, TEACHER, gradients, make_pair
from largest import Largest

from transkd.errors import UserError
from transkd.losses.cirkd_memory import CIRKDMemoryLoss, contrast_kl
from transkd.losses.shared.grids import labels_on_grid
from transkd.losses.shared.memory import ClassQueue, pixel_keys, region_keys
from transkd.losses.shared.pieces import BUDGET
from transkd.outputs import SegmentationOutput

HEAD = {
    "conv1.weight": "conv1.weight",
    "norm.weight": "bn.weight",
    "norm.bias": "bn.bias",
    "conv2.weight": "conv2.weight",
}


def output(feature):
    return SegmentationOutput(None, (feature,), (), torch.zeros(len(feature), 3, 4, 4))


def make_term(**settings):
    torch.manual_seed(0)
    small = {"pixel_memory": 30, "region_memory": 20, "pixel_contrast": 60, "region_contrast": 40}
    return CIRKDMemoryLoss(CLASSES, STUDENT, TEACHER, **(small | settings))


def pointers(term):
    return {kind: queue.pointer.tolist() for kind, queue in term.queues.items()}


def golden_term(vectors, **weights):
    term = CIRKDMemoryLoss(5, (6,), (10,), stage=1, pixel_memory=40, region_memory=6, **weights).double()
    state = term.state_dict() | {f"head.{ours}": vectors[f"param.proj.{name}"] for ours, name in HEAD.items()}
    for kind in term.queues:
        state[f"queues.{kind}.vectors"] = vectors[f"buffer.{kind}_queue"]
        state[f"queues.{kind}.pointer"] = vectors[f"buffer.{kind}_ptr"]
    term.load_state_dict(state, strict=True)
    return term


@pytest.mark.parametrize("kind", ["pixel", "region"])
def test_golden_values(kind):
    vectors = golden.load("cirkd_memory")
    term = golden_term(vectors, **{f"{other}_weight": float(other == kind) for other in ("pixel", "region")})
    feature = vectors["feat_s"].requires_grad_()
    _, valid = labels_on_grid(vectors["labels"], (8, 12))
    keys = F.normalize(vectors["feat_t"], dim=1)
    value = term.compare(term.project(feature), keys, valid, slots={kind: vectors[f"{kind}_index"]})
    value.backward()
    torch.testing.assert_close(value, vectors[f"expected.loss.{kind}"], rtol=1e-9, atol=0)
    torch.testing.assert_close(feature.grad, vectors[f"expected.grad.{kind}.feat_s"], rtol=1e-8, atol=1e-12)
    for ours, name in HEAD.items():
        gradient, expected = term.head.get_parameter(ours).grad, vectors[f"expected.grad.{kind}.param.proj.{name}"]
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


def test_golden_memory():
    vectors = golden.load("cirkd_memory")
    term = golden_term(vectors)
    labels, valid = labels_on_grid(vectors["labels"], (8, 12))
    keys = F.normalize(vectors["feat_t"], dim=1)
    term.remember(keys, labels, valid, priority=torch.arange(96).view(1, 8, 12).expand(2, 8, 12))
    for kind, queue in term.queues.items():
        expected = vectors[f"expected.{kind}_queue_after"]
        torch.testing.assert_close(queue.vectors, expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(queue.pointer, vectors[f"expected.{kind}_ptr_after"])


def test_forward_is_remember_project_compare():
    student, teacher, target = make_pair(dtype=torch.float64)
    term = make_term(pixel_weight=2.0, region_weight=0.5).double()
    other = copy.deepcopy(term)
    torch.manual_seed(1)
    value = term(student, teacher, target)
    labels, valid = labels_on_grid(target, teacher.features[3].shape[-2:])
    keys = F.normalize(teacher.features[3].detach(), dim=1)
    torch.manual_seed(1)
    other.remember(keys, labels, valid)
    torch.testing.assert_close(value, other.compare(other.project(student.features[3]), keys, valid))
    assert pointers(term) == pointers(other) != pointers(make_term())


def test_weights_weigh():
    vectors = golden.load("cirkd_memory")
    _, valid = labels_on_grid(vectors["labels"], (8, 12))
    keys = F.normalize(vectors["feat_t"], dim=1)
    term = golden_term(vectors, pixel_weight=2.0, region_weight=0.5)
    slots = {kind: vectors[f"{kind}_index"] for kind in ("pixel", "region")}
    value = term.compare(term.project(vectors["feat_s"]), keys, valid, slots=slots)
    expected = 2 * vectors["expected.loss.pixel"] + 0.5 * vectors["expected.loss.region"]
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)


def test_contrast_by_hand():
    student, teacher = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    p, q = (torch.tensor(logits).softmax(0) for logits in ([0.0, 4.0], [4.0, 0.0]))  # τT = 1/4; the second is alike
    expected = 0.5**2 / 2 * (p * (p / q).log()).sum()
    value = contrast_kl(student, teacher, torch.eye(2), temperature=0.5, kd_temperature=0.5)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("budget", [1, 50, 77])
def test_pieces_equal_the_whole(budget):
    generator = torch.Generator().manual_seed(0)
    student, teacher, anchors = (
        F.normalize(torch.randn(n, 4, generator=generator, dtype=torch.float64), dim=1) for n in (7, 7, 11)
    )

    def compute(budget):
        leaf = student.clone().requires_grad_()
        value = contrast_kl(leaf, teacher, anchors, 0.1, budget=budget)
        return value, *torch.autograd.grad(value, leaf)

    torch.testing.assert_close(compute(budget), compute(BUDGET), rtol=1e-12, atol=1e-14)
    assert contrast_kl(teacher, teacher, anchors, 0.1, budget=budget) == 0


def test_chosen_positions_are_of_their_class_and_differ():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 6, 7), generator=generator)
    labels[1][labels[1] == 1] = 0
    valid = torch.rand(2, 6, 7, generator=generator) < 0.8
    place = torch.arange(84.0).view(2, 1, 6, 7)  # each position's own number as its features
    chosen, classes = pixel_keys(place, labels, valid, num_classes=4, limit=5)
    numbers = chosen[:, 0].long()
    assert len(numbers) == len(set(numbers.tolist())) == 25  # three classes in one image, two in the other
    assert torch.equal(labels.flatten()[numbers], classes)
    assert valid.flatten()[numbers].all()
    image = numbers // 42
    assert (image * 4 + classes).diff().ge(0).all()  # images in order, classes ascending
    again, _ = pixel_keys(place, labels, valid, num_classes=4, limit=5)
    assert not torch.equal(again, chosen)
    everything, _ = pixel_keys(place, labels, valid, num_classes=4, limit=50)
    assert sorted(everything[:, 0].tolist()) == place.flatten()[valid.flatten()].tolist()


def test_regions_by_hand():
    keys = torch.tensor([[1.0, 0.0, 0.6, 1.0], [0.0, 1.0, 0.8, 0.0]]).view(1, 2, 1, 4).repeat(2, 1, 1, 1)
    labels = torch.tensor([[[2, 2, 0, 0]], [[0, 0, 0, 0]]])
    valid = torch.tensor([[[True, True, True, False]], [[False, True, False, False]]])
    regions, classes = region_keys(keys, labels, valid, num_classes=3)
    assert classes.tolist() == [0, 2, 0]
    torch.testing.assert_close(regions, torch.tensor([[0.6, 0.8], [0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_queue_goes_round():
    queue = ClassQueue(num_classes=3, slots=4, channels=1)
    start = queue.vectors.clone()
    assert torch.allclose(start.norm(dim=2), torch.ones(3, 4))

    def write(*keys, classes):
        queue.write(torch.tensor(keys)[:, None], torch.tensor(classes))

    write(10.0, 20.0, 11.0, 12.0, classes=[1, 2, 1, 1])
    assert queue.vectors[1, :3, 0].tolist() == [10, 11, 12]
    assert queue.pointer.tolist() == [0, 3, 1]
    write(13.0, 14.0, classes=[1, 1])
    assert queue.vectors[1, :, 0].tolist() == [14, 11, 12, 13]
    write(*range(21, 30), classes=[2] * 9)  # more than there is place for: as if written one by one
    assert queue.vectors[2, :, 0].tolist() == [28, 29, 26, 27]
    assert queue.pointer.tolist() == [0, 1, 2]
    assert torch.equal(queue.vectors[0], start[0])
    queue.write(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
    assert queue.pointer.tolist() == [0, 1, 2]


def test_slots_are_drawn_without_repetition():
    queue = ClassQueue(num_classes=2, slots=10, channels=1)
    drawn = queue.draw(6)
    assert len(set(drawn.tolist())) == 6
    assert sorted(queue.draw(50).tolist()) == list(range(10))
    assert {kind: make_term(pixel_contrast=4096).drawn[kind] for kind in ("pixel", "region")} == {
        "pixel": 820,
        "region": 9,
    }


def test_memory_is_written_in_training_alone():
    pair, term = make_pair(), make_term()
    before = copy.deepcopy(term.state_dict())
    term.eval()(*pair)
    assert all(torch.equal(tensor, before[name]) for name, tensor in term.state_dict().items())
    with torch.no_grad():
        term.train()(*pair)
    present = [int((labels_on_grid(pair.target, (2, 3))[0] == k).flatten(1).any(1).sum()) for k in range(CLASSES)]
    assert pointers(term)["region"] == present  # one for each image that has the class
    assert sum(pointers(term)["pixel"]) == 12  # all positions of two images of 2×3


def test_memory_holds_unit_vectors_of_the_teacher_in_checkpoints():
    term = make_term()
    term(*make_pair())
    for queue in term.queues.values():
        assert torch.allclose(queue.vectors.norm(dim=2), torch.ones(()))
    torch.manual_seed(5)
    other = CIRKDMemoryLoss(CLASSES, STUDENT, TEACHER, pixel_memory=30, region_memory=20)
    other.load_state_dict(term.state_dict(), strict=True)
    assert pointers(other) == pointers(term)
    assert torch.equal(other.queues["region"].vectors, term.queues["region"].vectors)


def test_nothing_to_learn():
    student, teacher, target = make_pair()
    term = make_term()
    value = term(student, teacher, torch.full_like(target, 255))
    value.backward()
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients(student))
    assert all((parameter.grad == 0).all() for parameter in term.parameters())
    assert set(pointers(term)["pixel"] + pointers(term)["region"]) == {0}


@pytest.mark.parametrize("ignored", [255, -1, CLASSES])
def test_ignored_positions_do_not_matter(ignored):
    student, teacher, target = make_pair(dtype=torch.float64)
    target[:, :, 64:] = ignored  # the last of three columns at stage 4
    changed = [o._replace(features=(*o.features[:3], o.features[3].detach().clone())) for o in (student, teacher)]
    for o in changed:
        o.features[3][..., 2] = 7
    results = []
    for pair in ((student, teacher), changed):
        term = make_term().double()
        torch.manual_seed(1)
        term.remember(F.normalize(pair[1].features[3], dim=1), *labels(target))
        # the head's batch normalisation sees every position, so the student's values are compared without it
        torch.manual_seed(1)
        keys = F.normalize(pair[1].features[3].detach(), dim=1)
        results.append((term.eval()(*pair, target), term.compare(keys.flip(1), keys, labels(target)[1])))
    torch.testing.assert_close(results[0], results[1])


def labels(target):
    grid, valid = labels_on_grid(target, (2, 3))
    return grid.clamp_max(CLASSES - 1), valid & (grid < CLASSES)


def test_one_kind_alone():
    term = make_term(region_weight=0.0)
    assert list(term.queues) == ["pixel"]
    term(*make_pair()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in term.parameters())


def test_other_sizes_are_resized_to_the_teachers():
    feature, other, target = torch.rand(2, 6, 3, 4), torch.rand(2, 7, 5, 8), torch.randint(0, 4, (2, 20, 32))
    enlarged = F.interpolate(feature, (5, 8), mode="bilinear", align_corners=False)
    term = CIRKDMemoryLoss(4, (6,), (7,), stage=1)
    values = []
    for maps in (feature, enlarged):
        torch.manual_seed(0)
        values.append(copy.deepcopy(term)(output(maps), output(other), target))
    assert values[0] == values[1]


def test_large_maps_in_little_memory():
    maps, target = [torch.randn(1, 4, 128, 256).requires_grad_() for _ in range(2)], torch.randint(19, (1, 512, 1024))
    term = CIRKDMemoryLoss(19, (4,), (4,), stage=1, region_weight=0, pixel_contrast=1024)
    with Largest() as largest:
        term(*(output(feature) for feature in maps), target).backward()
    assert largest.numel <= BUDGET


def _one_of_two_processes(rank, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    term, (keys, target, valid) = make_term(), _batch()
    mine = slice(0, 1) if rank == 0 else slice(1, 4)  # batches of unlike sizes
    for _ in range(2):
        term.remember(keys[mine], target[mine], valid[mine], priority=_priority()[mine])
    nobody = torch.zeros_like(valid) if rank == 0 else valid  # and one that has no label at all
    term.remember(keys[mine], target[mine], nobody[mine], priority=_priority()[mine])
    results[rank] = {name: tensor.numpy() for name, tensor in term.queues.state_dict().items()}
    dist.destroy_process_group()


def _batch():
    generator = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(4, TEACHER[3], 2, 3, generator=generator), dim=1)
    return keys, torch.randint(0, CLASSES, (4, 2, 3), generator=generator), torch.ones(4, 2, 3, dtype=torch.bool)


def _priority():
    return torch.arange(6).view(1, 2, 3).expand(4, 2, 3)


@pytest.mark.slow
def test_two_processes_hold_the_memory_of_one(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_one_of_two_processes, args=(tmp_path / "store", results), nprocs=2)
        held = [{name: torch.from_numpy(array) for name, array in results[rank].items()} for rank in range(2)]
    term, (keys, target, valid) = make_term(), _batch()
    for _ in range(2):
        term.remember(keys, target, valid, priority=_priority())
    valid[0] = False
    term.remember(keys, target, valid, priority=_priority())
    expected = term.queues.state_dict()
    for state in held:
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor)


def test_errors():
    with pytest.raises(UserError, match="stage must be from 1 to 4; got 5"):
        make_term(stage=5)
    for weights in ((0.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(
            UserError, match="pixel_weight and region_weight must be at least 0 and one of them greater"
        ):
            make_term(pixel_weight=weights[0], region_weight=weights[1])
    for setting in ("temperature", "kd_temperature"):
        with pytest.raises(UserError, match="temperature must be a number greater than 0"):
            make_term(**{setting: 0.0})
    for setting in ("pixel_memory", "region_memory", "pixel_contrast", "region_contrast", "pixels_per_image"):
        with pytest.raises(UserError, match=f"{setting} must be a whole number of at least 1"):
            make_term(**{setting: 0})
    with pytest.raises(UserError, match="num_classes must be a whole number"):
        CIRKDMemoryLoss(0, STUDENT, TEACHER)
    with pytest.raises(UserError, match="target=labels"):
        make_term()(*make_pair()[:2])
    with pytest.raises(UserError, match="with the same number of stages"):
        CIRKDMemoryLoss(5, (8,), (8, 16))
    student, teacher, target = make_pair(batch=1, size=(32, 32))
    with pytest.raises(UserError, match="cannot normalise a batch of one whose map is 1 x 1"):
        make_term()(student, teacher, target)
    assert make_term().eval()(student, teacher, target).isfinite()

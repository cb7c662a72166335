"""A teacher's classes mapped to ours: merged, dropped, reordered."""

import pytest
import torch
from documents import text, write_files
from hydra import compose, initialize_config_dir
from runs import composed, results

from transkd.cli import CONF
from transkd.data import CITYSCAPES
from transkd.errors import UserError
from transkd.losses import CWDLoss, DISTLoss, KDLoss
from transkd.models import FrozenTeacher, MappedClasses, create_segmenter, load_segmenter, save_segmenter
from transkd.models.class_map import map_logits, read_class_map
from transkd.outputs import SegmentationOutput
from transkd.run import run
from transkd.settings import TrainSettings

TINY = {"channels": [8, 16, 40, 64], "depths": [1, 1, 1, 1]}
SOURCES = [[3], [0, 4], [1]]  # reordered, merged; class 2 is dropped
OURS, THEIRS = ("sky", "flat", "car"), ("road", "car", "rider", "sky", "sidewalk")


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return create_segmenter("segformer_b0", 5, width=16, encoder=TINY).eval()


@pytest.fixture
def logits():
    return 5 * torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_mapped_probabilities_are_those_of_the_sources_renormalised(logits):
    p = logits.softmax(1)
    kept = 1 - p[:, 2]
    expected = torch.stack([p[:, 3], p[:, 0] + p[:, 4], p[:, 1]], dim=1) / kept[:, None]
    mapped = map_logits(logits, SOURCES).softmax(1)
    torch.testing.assert_close(mapped, expected)
    torch.testing.assert_close(mapped.sum(1), torch.ones_like(kept))


def test_certain_logits_stay_finite():
    logits = torch.tensor([1e4, -1e4, 0.0]).view(1, 3, 1, 1)
    mapped = map_logits(logits, [[1, 2], [0]])
    assert mapped.flatten().tolist() == [0.0, 1e4]


@pytest.mark.parametrize("term", [KDLoss(), CWDLoss(), DISTLoss()])
def test_the_identity_reproduces_the_unmapped_loss(term, logits):
    student, teacher = (SegmentationOutput(x, (), (), torch.zeros(2, 3, 16, 24)) for x in (logits.flip(0), logits))
    mapped = teacher._replace(logits=map_logits(logits, [[i] for i in range(5)]))
    assert torch.equal(mapped.logits, logits)
    assert term(student, mapped) == term(student, teacher)


def test_everything_but_the_logits_is_the_networks(teacher):
    image = torch.rand(1, 3, 64, 96)
    plain, mapped = teacher(image), MappedClasses(teacher, SOURCES)(image)
    assert all(torch.equal(a, b) for a, b in zip(plain.features, mapped.features, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.embeddings, mapped.embeddings, strict=True))
    assert mapped.logits.shape[1] == 3
    assert MappedClasses(teacher, SOURCES)(image, {"features"}).logits is None


def test_it_follows_what_loading_changes(teacher):
    mapped = MappedClasses(teacher, SOURCES)
    teacher.mean.fill_(0.25)
    teacher.lineage = [{"part": "weights", "source": "x", "license": None}]
    assert mapped.mean.flatten().tolist() == [0.25] * 3
    assert mapped.lineage == teacher.lineage
    assert (mapped.channels, mapped.num_classes, mapped.name) == (teacher.channels, 3, teacher.name)
    with pytest.raises(AttributeError):
        mapped.nothing  # noqa: B018


def test_predictions_are_mapped(teacher):
    image = torch.rand(1, 3, 64, 64)
    expected = map_logits(teacher(image).logits, SOURCES)
    from_logits = torch.nn.functional.interpolate(expected, (64, 64), mode="bilinear").argmax(1)
    assert torch.equal(MappedClasses(teacher, SOURCES).predict(image).long(), from_logits)


def test_frozen_and_in_half_precision(teacher):
    image = torch.rand(1, 3, 64, 64)
    frozen = FrozenTeacher(MappedClasses(teacher, SOURCES))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = frozen(image).logits, map_logits(teacher(image).logits, SOURCES)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_names_and_ids():
    by_name = {"flat": ["road", "sidewalk"], "car": "car", "sky": ["sky"]}
    by_id = {1: [0, 4], 2: 1, 0: [3]}
    assert read_class_map(by_name, OURS, THEIRS, 5) == read_class_map(by_id, OURS, None, 5) == SOURCES


@pytest.mark.parametrize(
    ("changes", "theirs", "message"),
    [
        ({"flat": []}, THEIRS, "no class of the teacher for flat; expected at least one"),
        ({"flat": ["road", "car"]}, THEIRS, "the teacher's class car is given twice"),
        ({"flat": ["rode"]}, THEIRS, "'rode' is not among the teacher's classes; did you mean 'road'"),
        ({"flad": ["road"]}, THEIRS, "'flad' is not among our classes; did you mean 'flat'"),
        ({"flat": [5]}, THEIRS, "5 is not among the teacher's classes 0…4; .* teacher.network.num_classes"),
        ({"flat": ["road"]}, None, "the teacher's weights do not name their classes, .* give ids from 0 to 4"),
        ({}, THEIRS[:4], "the teacher's weights have 4 classes, its network 5; set teacher.network.num_classes=4"),
    ],
)
def test_a_wrong_map_is_one_line(changes, theirs, message):
    class_map = {"sky": [3], "flat": [0, 4], "car": [1], **changes}
    with pytest.raises(UserError, match=message) as error:
        read_class_map(class_map, OURS, theirs, 5)
    assert "\n" not in str(error.value)


def test_the_guides_map_is_one_of_cityscapes(tmp_path):
    write_files(text("guide"), tmp_path)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = [f"hydra.searchpath=[file://{tmp_path / 'my'}]", "teacher=cityscapes_b2", "run_dir=run"]
        teacher = TrainSettings.read(compose("train", settings)).teacher
    assert teacher.network["num_classes"] == 19
    sources = read_class_map(teacher.class_map, ["object", "background", "drivable"], CITYSCAPES.names, 19)
    assert [CITYSCAPES.names[ids[0]] for ids in sources] == ["person", "building", "road"]


@pytest.mark.slow
def test_a_run_with_a_teacher_of_other_classes(tmp_path):
    """A teacher of 21 classes, some of which are ours by name; it is scored and read with our 19."""
    names = (*reversed(CITYSCAPES.names), "lane", "boat")
    weights = tmp_path / "teacher.safetensors"
    save_segmenter(create_segmenter("segformer_b0", 21), weights, (names, [(0, 0, 0)] * 21))
    pairs = ",".join(f"{name}:[{name}{',lane' if name == 'road' else ''}]" for name in CITYSCAPES.names)
    settings = ["distill=kd", "student.from_teacher=select", "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
    settings += [f"teacher.weights={weights}", "teacher.network.num_classes=21", f"teacher.class_map={{{pairs}}}"]
    run(composed(tmp_path, "mapped", *settings))
    found = results(tmp_path, "mapped")
    assert found["teacher"]["mIoU"] >= 0
    assert len(found["teacher"]["iou"]) == 19
    assert found["teacher"]["teacher_classes"][:2] == [[18, 19], [17]]
    assert load_segmenter(tmp_path / "mapped" / "student.safetensors")[0].num_classes == 19
    with pytest.raises(UserError, match="maps the classes of trained weights, but there are none"):
        run(composed(tmp_path, "none", *settings[:1], settings[-1]))

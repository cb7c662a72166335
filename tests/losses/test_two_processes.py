"""Data-parallel training in earnest: two processes with half a batch each have the gradients of one with all of it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from drawn import CLASSES, STUDENT, TEACHER, Pair, images_of, make_pair, redrawn
from hydra.utils import instantiate
from test_term_contract import ACROSS_THE_BATCH, AT_RANDOM, FILES, SAME_WIDTHS, entry
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from transkd.losses import TaskCrossEntropy
from transkd.outputs import SegmentationOutput

PER_IMAGE = [path for path in FILES if path.stem not in ACROSS_THE_BATCH | AT_RANDOM]


class Taught(nn.Module):
    """A term, and a student of one 1×1 convolution for each stage and for the logits."""

    def __init__(self, term, widths):
        super().__init__()
        self.term = term
        self.stages = nn.ModuleList(nn.Conv2d(width, width, 1) for width in widths)
        self.logits = nn.Conv2d(CLASSES, CLASSES, 1)

    def forward(self, drawn, teacher, target):
        features = tuple(stage(maps) for stage, maps in zip(self.stages, drawn.features, strict=True))
        embeddings = tuple(maps.flatten(2).transpose(1, 2) for maps in features)
        student = drawn._replace(logits=self.logits(drawn.logits), features=features, embeddings=embeddings)
        unread = [*self.stages.parameters(), *self.logits.parameters()]  # of these the term may leave some out,
        return self.term(student, teacher, target) + 0 * sum(p.sum() for p in unread)  # of its own it must not


def taught(path):
    """The same in every process."""
    teacher = STUDENT if path.stem in SAME_WIDTHS else TEACHER
    torch.manual_seed(0)
    module = Taught(instantiate(entry(path, STUDENT, teacher)).term, STUDENT)
    return redrawn(module), make_pair(STUDENT, teacher, batch=4, dtype=torch.float64)


def gradients_of(module):
    return {name: p.grad for name, p in module.named_parameters()}


def _one_of_two_processes(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mine = slice(2 * rank, 2 * rank + 2)
    for path in PER_IMAGE:
        module, pair = taught(path)
        half = Pair(images_of(pair.student, mine), images_of(pair.teacher, mine), pair.target[mine])
        shared = DistributedDataParallel(module)  # by a name: the hooks that average go with it
        shared(*half).backward()
        alone, pair = taught(path)
        alone(*pair).backward()
        expected, learns = gradients_of(alone), False
        for name, gradient in gradients_of(module).items():
            said = f"{path.stem}, {name}: {{}}".format
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-12, msg=said)
            learns |= bool(gradient.any())
        assert learns, path.stem
    dist.destroy_process_group()


def _task_of_one_of_two_processes(rank, file):
    """Cross-entropy where one process has hardly a valid pixel: by torch's own on the whole batch."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    logits = torch.randn(4, 5, 6, 8, dtype=torch.float64)
    target = torch.randint(5, (4, 12, 16))
    target[:2, 1:] = 255
    weights = [1.0, 2.0, 0.5, 3.0, 1.0]
    for class_weights in (None, weights):
        for labels, resolution in ((target, "labels"), (target[:, ::2, ::2], "logits")):
            scale = nn.Parameter(torch.ones(5, 1, 1, dtype=torch.float64))
            mine = slice(2 * rank, 2 * rank + 2)
            output = SegmentationOutput(logits[mine] * scale, (), (), None)
            value = TaskCrossEntropy(class_weights, resolution)(output, None, labels[mine])
            value.backward()
            together = torch.stack([value.detach(), *scale.grad.flatten()])
            dist.all_reduce(together)  # DistributedDataParallel takes the mean
            whole = nn.Parameter(torch.ones(5, 1, 1, dtype=torch.float64))
            enlarged = F.interpolate(logits * whole, size=labels.shape[-2:], mode="bilinear")
            weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
            expected = F.cross_entropy(enlarged, labels, weight, ignore_index=255)
            expected.backward()
            torch.testing.assert_close(together / 2, torch.stack([expected.detach(), *whole.grad.flatten()]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ignored_pixels_bias_no_process(tmp_path):
    mp.spawn(_task_of_one_of_two_processes, args=(tmp_path / "store",), nprocs=2)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    assert len(PER_IMAGE) >= 10
    mp.spawn(_one_of_two_processes, args=(tmp_path / "store",), nprocs=2)

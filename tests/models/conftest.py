"""The small networks of the golden vectors, and a MiT-B0 to share."""

import copy

import golden
import pytest
import torch

from transkd.models import MixTransformer, SegformerHead, Segmenter, create_segmenter
from transkd.models.storage.transkd_checkpoint import split_transkd_checkpoint

CLASSES = 5
GOLDEN = {
    "segformer_student": {"channels": (8, 16, 24, 32), "heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1), "width": 16},
    "segformer_teacher": {"channels": (12, 20, 28, 40), "heads": (1, 2, 4, 5), "depths": (1, 1, 2, 1), "width": 24},
}


@pytest.fixture(params=GOLDEN)
def golden_name(request):
    """Each golden network in turn."""
    return request.param


@pytest.fixture
def golden_network(golden_name):
    """The golden network in float64 with its parameters, in eval; it feeds the image as it is."""
    sizes = dict(GOLDEN[golden_name])
    width = sizes.pop("width")
    encoder = MixTransformer(**sizes, num_classes=0)
    head = SegformerHead(sizes["channels"], width, CLASSES)
    network = Segmenter(encoder, head, CLASSES, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).double()
    parameters = {f"student.{name}": value for name, value in golden.load(golden_name, "param.").items()}
    network.load_state_dict(split_transkd_checkpoint(parameters)["student"], strict=True)
    return network.eval()


@pytest.fixture(scope="session")
def _b0():
    torch.manual_seed(0)
    return create_segmenter("segformer_b0", num_classes=5, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


@pytest.fixture
def b0(_b0):
    """A SegFormer-B0 with 5 classes and a normalisation of its own, in train mode."""
    return copy.deepcopy(_b0)

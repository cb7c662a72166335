"""Read golden vectors: tensors named ``in.*``, ``param.*``, ``out.*``, ``loss.*`` and ``grad.*``, float64."""

from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from transkd.outputs import SegmentationOutput

FOLDER = Path(__file__).parent / "golden"


@cache
def _load(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def load(name: str, prefix: str = "") -> dict[str, Tensor]:
    """Give copies of the tensors whose names start with `prefix`, without it, in the order of their names."""
    tensors = sorted(_load(name).items())
    return {key.removeprefix(prefix): value.clone() for key, value in tensors if key.startswith(prefix)}


def stages(name: str, prefix: str) -> tuple[Tensor, ...]:
    """Give ``prefix1``, ``prefix2``, … as a tuple."""
    return tuple(load(name, prefix).values())


def output(name: str, who: str) -> SegmentationOutput:
    """Give the inputs of "student" or "teacher"; all but the image take a gradient."""
    image = load(name, "in.image").get("")
    features, embeddings = (stages(name, f"in.{who}.{kind}") for kind in ("feature", "embedding"))
    for tensor in (*features, *embeddings):
        tensor.requires_grad_()
    return SegmentationOutput(None, features, embeddings, image)

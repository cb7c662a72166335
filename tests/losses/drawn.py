"""What the tests of the losses share: outputs of networks that were never there."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from transkd.outputs import SegmentationOutput

STUDENT = (8, 16, 24, 32)
TEACHER = (12, 20, 28, 40)
CLASSES = 5


class Pair(NamedTuple):
    """A student's and a teacher's output for the same batch, and labels: a term's arguments."""

    student: SegmentationOutput
    teacher: SegmentationOutput
    target: Tensor


def make_output(
    channels: tuple[int, ...] = STUDENT,
    batch: int = 2,
    size: tuple[int, int] = (64, 96),
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> SegmentationOutput:
    """Draw what a network with strides 4, 8, 16, … would show; every tensor takes a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    grids = [(size[0] // (4 * 2**i), size[1] // (4 * 2**i)) for i in range(len(channels))]
    return SegmentationOutput(
        logits=draw(batch, CLASSES, *grids[0]),
        features=tuple(draw(batch, c, *grid) for c, grid in zip(channels, grids, strict=True)),
        embeddings=tuple(draw(batch, grid[0] * grid[1], c) for c, grid in zip(channels, grids, strict=True)),
        image=draw(batch, 3, *size),
    )


def make_pair(student: tuple[int, ...] = STUDENT, teacher: tuple[int, ...] = TEACHER, **settings) -> Pair:
    """Draw a student's and a teacher's output of unlike channels, and labels."""
    mine, other = make_output(student, seed=1, **settings), make_output(teacher, seed=2, **settings)
    generator = torch.Generator().manual_seed(3)
    shape = (len(mine.image), *mine.image.shape[-2:])
    return Pair(mine, other, torch.randint(0, CLASSES, shape, generator=generator))


def images_of(output: SegmentationOutput, part: slice) -> SegmentationOutput:
    """Take some of the batch's images."""
    return output._replace(
        logits=output.logits[part],
        features=tuple(maps[part] for maps in output.features),
        embeddings=tuple(tokens[part] for tokens in output.embeddings),
        image=output.image[part],
    )


def tensors(output: SegmentationOutput) -> list[Tensor]:
    """List an output's tensors."""
    listed = (output.logits, *output.features, *output.embeddings, output.image)
    return [tensor for tensor in listed if tensor is not None]


def gradients(output: SegmentationOutput) -> list[Tensor]:
    """List the gradients that reached an output."""
    return [tensor.grad for tensor in tensors(output) if tensor.grad is not None]


def redrawn(term: nn.Module) -> nn.Module:
    """Give a term in float64 with larger parameters than at the start: no gradient is near 0 by accident."""
    generator = torch.Generator().manual_seed(4)
    term = term.double()
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return term

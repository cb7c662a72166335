"""Compare an exported network with the original."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from transkd.errors import UserError
from transkd.models import Segmenter
from transkd.models.storage.exporting import smallest
from transkd.pictures import Pixels

__all__ = ["Difference", "Images", "check_parity"]

Images = list[tuple[str, Pixels]]
"""Pairs of a name and an image [H, W, 3]."""


class Difference(NamedTuple):
    """Differences between the exported and the original network on one batch.

    Attributes:
        images: name and size of the batch.
        logits: largest absolute difference of a logit.
        agreement: share of pixels with the same class.
    """

    images: str
    logits: float
    agreement: float


def check_parity(
    network: Segmenter,
    run: Callable[[Tensor], Tensor],
    images: Images,
    minimum: int,
    tolerance: float,
    format: str,
) -> None:
    """Run both networks on random and real images, print the differences and compare them with ``tolerance``.

    Args:
        network: the original, in eval mode.
        run: the exported network, see ``transkd.models.storage.exporting.Exported``.
        images: names and real images.
        minimum: smallest height and width that the export accepts; one random image is a square of this size.
        tolerance: largest permitted absolute difference of a logit.
        format: name of the format for messages.

    Raises:
        UserError: they differ by more, or the exported network fails.
    """
    random = torch.Generator().manual_seed(0)
    batches: list[tuple[str, Tensor]] = []
    larger = [(smallest(network, height), smallest(network, width)) for height, width in ((96, 160), (75, 133))]
    for height, width in ((minimum, minimum), *larger):  # the last is not divisible by any stride
        for count in (1, 2):
            image = torch.randint(256, (count, 3, height, width), generator=random, dtype=torch.uint8)
            batches.append(("random", image))
    batches += [(name, torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]) for name, pixels in images]

    table = Table("images", "size", "max |Δ logit|", "same class", title=f"{format} against the network")
    differences = []
    for name, image in batches:
        size = "×".join(str(n) for n in (len(image), *image.shape[2:]))
        try:
            with torch.no_grad():
                ours, theirs = network(image, needs={"logits"}).logits, run(image)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"the exported network fails on {name} images {size}: {reason}") from error
        if ours.shape != theirs.shape:
            raise UserError(
                f"the exported network returns {list(theirs.shape)} for {name} images {size}, expected "
                f"{list(ours.shape)}"
            )
        same = (ours.argmax(1) == theirs.argmax(1)).float().mean().item()
        differences.append(Difference(f"{name} {size}", (ours - theirs).abs().max().item(), same))
        table.add_row(name, size, f"{differences[-1].logits:.1e}", f"{100 * same:.3f} %")
    Console().print(table)

    failed = [difference for difference in differences if not difference.logits <= tolerance]  # catches NaN too
    if failed:
        worst = max(failed, key=lambda difference: (difference.logits != difference.logits, difference.logits))
        inherent = "; transformers uses ε = 1e-5 in LayerNorm, SegFormer 1e-6" if format == "hf" else ""
        raise UserError(
            f"format={format} differs from the network by {worst.logits:.2e} in a logit ({worst.images}, "
            f"{100 * worst.agreement:.3f} % of pixels in the same class), tolerance={tolerance:g}{inherent}; "
            "nothing was written"
        )

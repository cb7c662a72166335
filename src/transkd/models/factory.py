"""Build networks by name."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import nn

from transkd.errors import UserError
from transkd.models.catalog import SEGMENTERS, Recipe
from transkd.models.encoders.lvt import LiteVisionTransformer
from transkd.models.encoders.mit import VARIANTS
from transkd.models.encoders.timm_encoder import TimmEncoder
from transkd.models.heads import DeepLabV3PlusHead, SegformerHead, SemanticFPNHead
from transkd.models.segmenter import Segmenter
from transkd.models.storage.formats import looks_like
from transkd.models.storage.lineage import CODE, RANDOM
from transkd.models.storage.loading import load_weights
from transkd.models.storage.sources import Weights, read_weights

__all__ = ["ENCODERS", "HEADS", "create_segmenter", "load_segmenter"]


ENCODERS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(timm.create_model, name, num_classes=0) for name in VARIANTS},
    "lvt": LiteVisionTransformer,
}
"""Factories of encoders by name, called with keyword arguments; an encoder has ``channels`` and ``forward_stages`` (see
``Segmenter``).

Any other name must be a timm network with four stages (``TimmEncoder``).
"""

HEADS: dict[str, Callable[[Sequence[int], int, int], nn.Module]] = {
    "segformer": SegformerHead,
    "fpn": SemanticFPNHead,
    "deeplabv3plus": DeepLabV3PlusHead,
}
"""Factories of decode heads by name, called with the stages' channels, a width and the number of classes."""


def create_segmenter(
    name: str,
    num_classes: int,
    weights: str | Path | None = None,
    head: str | None = None,
    width: int | None = None,
    encoder: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scale: float = 1.0,
    classifier: str = "same",
    license: str | None = None,
) -> Segmenter:
    """Build a segmentation network by name.

    Args:
        name: one of ``SEGMENTERS`` (``segformer_b0`` …, ``lvt``, ``pvt_v2_b2`` …, ``deeplabv3plus_resnet101``), one
            of ``ENCODERS`` (``mit_b0`` …), or any timm network with four stages (``convnext_tiny``).
        num_classes: number of classes K.
        weights: initial weights, see ``transkd.models.load_weights``; None initialises at random.
        head: one of ``HEADS``; by default that of the entry in ``SEGMENTERS``, for other names ``segformer``.
        width: channels inside the head; None uses the network's default.
        encoder: arguments for the encoder (``drop_path_rate``, ``output_stride``, …).
        mean: subtracted from RGB in [0, 1]; by default that of the weights, without weights ImageNet's.
        std: divides the difference; same default.
        scale: factor by which the image is resized for the network (0.5: half its height and width).
        classifier: "same" requires weights for the same classes, "new" initialises the classifier at random.
        license: licence of the weights, if their file does not state it.

    Raises:
        UserError: the name is unknown, or the weights do not fit.

    Example:
        >>> network = create_segmenter("segformer_b0", num_classes=19)
        >>> round(sum(p.numel() for p in network.parameters()) / 1e6, 2)
        3.72
        >>> create_segmenter("resnet18", num_classes=5, head="fpn", width=128).channels
        (64, 128, 256, 512)
    """
    _check_name(name)
    recipe = SEGMENTERS.get(name) or Recipe(name, "segformer", 256)
    head = head or recipe.head
    if head not in HEADS:
        raise UserError(f"unknown head {head!r}; there are: {', '.join(HEADS)}")
    built = _create_encoder(recipe.encoder, {**recipe.args, **(encoder or {})})
    decoder = HEADS[head](built.channels, width or recipe.width, num_classes)
    network = Segmenter(built, decoder, num_classes, mean, std, scale)
    network.name = name
    given = {"head": head, "width": width, "encoder": dict(encoder or {}), "scale": scale}
    usual_head = recipe.head if name in SEGMENTERS else None
    usual: dict[str, Any] = {"head": usual_head, "width": None, "encoder": {}, "scale": 1.0}
    chosen = {key: value for key, value in given.items() if value != usual[key]}
    network.recipe = {"name": name, "num_classes": num_classes, **chosen}
    network.lineage = [CODE, RANDOM]
    if weights is not None:
        load_weights(network, weights, classifier, license)
    return network


def load_segmenter(source: str | Path | Weights, license: str | None = None) -> tuple[Segmenter, dict[str, Any]]:
    """Build the network that a file of weights describes and load them; return the network and its card.

    Files and folders written by transkd name their network; a complete SegFormer from another source is recognised by
    its tensors.

    Args:
        source: see ``read_weights``, or its result.
        license: licence of the weights, if they do not state it.

    Raises:
        UserError: the network is not known (build it with ``create_segmenter(..., weights=source)``).
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    recipe = weights.recipe
    if recipe is None:
        what = looks_like(weights.tensors)
        raise UserError(
            f"{weights.source} does not say which network it contains{f' (it looks like {what})' if what else ''}; "
            "give the network: student=… on the command line, create_segmenter(name, num_classes, weights=…) in Python"
        )
    network = create_segmenter(**recipe)
    load_weights(network, weights, license=license)
    return network, weights.card


def _check_name(name: str) -> None:
    known = {*SEGMENTERS, *ENCODERS}
    if name in known or timm.is_model(name):
        return
    near = get_close_matches(name, sorted({*known, *timm.list_models()}), n=3)
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise UserError(
        f"unknown network {name!r}{hint}. There are {', '.join(SEGMENTERS)}, and every name of timm.list_models(); "
        "one of your own is known once its module is imported: plugins=[MODULE]"
    )


def _create_encoder(name: str, args: dict[str, Any]) -> Any:
    if name not in ENCODERS:
        return TimmEncoder(name, **args)
    try:
        return ENCODERS[name](**args)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{name} does not take the arguments {args}: {error}") from error

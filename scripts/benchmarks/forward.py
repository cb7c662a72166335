"""The subcommand ``forward``: inference from image to logits, compared with other implementations."""

import argparse
import importlib
import math
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import measure
from transkd.errors import UserError
from transkd.layers import attention
from transkd.models import SEGMENTERS, SegformerHead, Segmenter, create_segmenter
from transkd.models.encoders.mit import VARIANTS
from transkd.models.storage.formats import SMP, rename_to_huggingface

TOLERANCE = 1e-3  # between the alternatives' logits in float32, relative to the largest logit


class Alternative(NamedTuple):
    """An implementation of the same network, from a normalised image to logits."""

    name: str
    module: nn.Module
    logits: Callable[[Tensor], Tensor]


def build_network(name: str, classes: int, head: str | None = None) -> Segmenter:
    """Build one of our networks with random weights, in eval mode, for normalised images.

    The other libraries expect normalised images, so ours gets mean 0 and standard deviation 1, but still computes the
    normalisation. Biases and norms are randomised: with 0 and 1 an error in mapping them would not show.
    """
    network = create_segmenter(name, classes, head=head, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    roughen(network)
    return network


@torch.no_grad()
def roughen(network: Segmenter) -> None:
    """Randomise biases, norms and the head's BatchNorm statistics."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    for module in network.head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


def build_ours(network: Segmenter) -> list[Alternative]:
    """Return the network and, if its head can be fused for inference, the fused network."""
    found = [Alternative("ours", network, lambda image: _logits(network, image))]
    if isinstance(network.head, SegformerHead):
        fused = network.fuse()
        found.append(Alternative("fused", fused, lambda image: _logits(fused, image)))
    return found


def best_of_ours(names: Container[str]) -> str:
    """Name of the alternative that ratios refer to."""
    return "fused" if "fused" in names else "ours"


def _logits(network: Segmenter, image: Tensor) -> Tensor:
    return network(image, needs={"logits"}).logits


def build_unfolded(network: Segmenter) -> list[Alternative]:
    """Our encoder with the SegFormer head computed as in the paper."""
    if not isinstance(network.head, SegformerHead):
        raise UserError(f"--against unfolded, drawn-out: {network.name} has no SegFormer head")
    head = network.head

    def logits(image: Tensor) -> Tensor:
        features, _ = network.encoder.forward_stages(network.normalise(image))
        return draw_out(head, features)

    return [Alternative("unfolded", network, logits)]


def build_drawn_out(network: Segmenter) -> list[Alternative]:
    """Reference implementation: the head as in the paper, and attention matrices held in memory."""
    (unfolded,) = build_unfolded(network)

    def logits(image: Tensor) -> Tensor:
        with drawn_out_attention():
            return unfolded.logits(image)

    return [Alternative("drawn-out", network, logits)]


@contextmanager
def drawn_out_attention() -> Iterator[None]:
    """Compute attention with explicit matrices instead of fused kernels."""
    with (
        mock.patch.object(F, "scaled_dot_product_attention", explicit_attention),
        mock.patch.object(attention, "convolution_pays", return_value=False),
    ):
        yield


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """Compute softmax(Q Kᵀ / √d) V with an explicit attention matrix."""
    assert dropout_p == 0
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    return scores.softmax(-1) @ value


def draw_out(head: SegformerHead, features: Sequence[Tensor]) -> Tensor:
    """Compute SegFormer's decode head as in the paper: linear, upsample, concatenate deepest first, fuse, classify."""
    maps = []
    for name, feature in zip(head.linears, features, strict=True):
        tokens = head.get_submodule(name).proj(feature.flatten(2).transpose(1, 2))
        drawn = tokens.transpose(1, 2).unflatten(2, feature.shape[-2:])
        maps.append(F.interpolate(drawn, size=features[0].shape[-2:], mode="bilinear", align_corners=False))
    fused = head.linear_fuse.conv(torch.cat(maps[::-1], dim=1))
    return head.linear_pred(head.dropout(F.relu(head.linear_fuse.bn(fused))))


def build_transformers(network: Segmenter) -> list[Alternative]:
    """Build the same SegFormer in Hugging Face's transformers."""
    library = _library("transformers", "transformers")
    encoder = _segformer_encoder(network, "transformers")
    config = library.SegformerConfig(
        hidden_sizes=list(network.channels),
        depths=list(VARIANTS[encoder]["depths"]),
        decoder_hidden_size=_width(network),
        num_labels=network.num_classes,
    )
    library.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tensors = {name: tensor.contiguous() for name, tensor in rename_to_huggingface(network.state_dict()).items()}
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        model = library.SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    return [Alternative("transformers", model, lambda image: model(image).logits)]


def build_smp(network: Segmenter) -> list[Alternative]:
    """Build the same SegFormer in segmentation_models.pytorch, with and without its final upsampling."""
    library = _library("segmentation_models_pytorch", "smp")
    encoder = _segformer_encoder(network, "smp")
    model = library.Segformer(
        encoder, encoder_weights=None, decoder_segmentation_channels=_width(network), classes=network.num_classes
    ).eval()
    prefixes = {ours: theirs for theirs, ours in SMP.items()}
    renamed = {}
    for name, tensor in network.state_dict().items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        renamed[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    model.load_state_dict(renamed)
    return [
        Alternative("smp", model, model),
        Alternative(
            "smp, stride 4", model, lambda image: model.segmentation_head[0](model.decoder(model.encoder(image)))
        ),
    ]


def _library(module: str, option: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--against {option} needs the package {module} ({error}): pip install {module}") from None


def _segformer_encoder(network: Segmenter, option: str) -> str:
    recipe = SEGMENTERS.get(network.name)
    if recipe is None or recipe.encoder not in VARIANTS or not isinstance(network.head, SegformerHead):
        raise UserError(f"--against {option}: the library has no {network.name}, only segformer_b0 to segformer_b5")
    return recipe.encoder


def _width(network: Segmenter) -> int:
    return network.head.linear_pred.in_channels


AGAINST: dict[str, Callable[[Segmenter], list[Alternative]]] = {
    "drawn-out": build_drawn_out,
    "unfolded": build_unfolded,
    "transformers": build_transformers,
    "smp": build_smp,
}


def build_alternatives(network: Segmenter, against: Sequence[str]) -> list[Alternative]:
    """Build ours and the other implementations, all with the same weights."""
    return [*build_ours(network), *(alternative for name in against for alternative in AGAINST[name](network))]


def compare_logits(alternatives: Sequence[Alternative], image: Tensor) -> dict[str, float]:
    """Maximum absolute difference of each from the first, relative to the largest logit.

    Raises:
        UserError: a difference exceeds rounding errors, so timings would not be comparable.
    """
    reference = alternatives[0].logits(image)
    distances = {}
    for name, _, logits in alternatives:
        got = logits(image)
        wanted = reference
        if got.shape != wanted.shape:  # smp upsamples its logits to the image's size with align_corners=True
            wanted = F.interpolate(reference, size=got.shape[-2:], mode="bilinear", align_corners=True)
        distances[name] = ((got - wanted).abs().max() / wanted.abs().max()).item()
        if not distances[name] <= TOLERANCE:
            raise UserError(
                f"{name} does not compute the same network: its logits are {distances[name]:.1e} of the largest logit "
                f"away from ours, expected at most {TOLERANCE:.0e}; nothing was timed"
            )
    return distances


# The subcommand.


def forward(args: argparse.Namespace) -> None:
    """Inference from image to logits, compared with other implementations of the same network."""
    device, dtype, found = measure.prepare(args)
    alternatives = build_alternatives(build_network(args.network, args.classes), args.against)
    best = best_of_ours([alternative.name for alternative in alternatives])
    if args.compile:
        chosen = next(alternative for alternative in alternatives if alternative.name == best)
        logits = torch.compile(chosen.logits, mode=args.compile)
        alternatives.append(Alternative(best + measure.COMPILED, chosen.module, logits))
    image = torch.randn(args.batch, 3, *args.size)
    with torch.inference_mode():
        distances = compare_logits(alternatives, image)
        for alternative in alternatives:
            alternative.module.to(device, dtype)
        image = image.to(device, dtype)
        runs = {name: lambda logits=logits: logits(image) for name, _, logits in alternatives}
        costs = measure.measure_costs(runs, args, best)
        if args.profile:
            if args.calm:
                measure.wait_for_calm()
            found["operators"] = measure.operator_shares(runs[best], device)

    sizes = [sum(parameter.numel() for parameter in module.parameters()) for _, module, _ in alternatives]
    found["rows"] = [
        {**cost._asdict(), "parameters": size, "difference": distances[cost.name]}
        for cost, size in zip(costs, sizes, strict=True)
    ]
    header = ("forward", *measure.COSTS, "parameters M", "difference")
    rows = [
        [cost.name, *measure.cost_cells(cost), f"{size / 1e6:.2f}", f"{distances[cost.name]:.0e}"]
        for cost, size in zip(costs, sizes, strict=True)
    ]
    tables = [measure.as_markdown(header, rows)]
    if args.profile:
        tables.append(measure.as_markdown((f"operator of {best}", "share %"), measure.largest(found["operators"])))
    shape = "×".join(map(str, image.shape))
    measure.report(args, f"{args.network}, {args.classes} classes, {shape}", found, *tables)


def add(subparsers: Any) -> None:
    """Add the subcommand and its arguments."""
    parser = measure.add_command(subparsers, forward)
    parser.add_argument("--network", default="segformer_b0", help="any name that create_segmenter accepts")
    measure.add_image_options(parser)
    measure.add_against_option(parser, AGAINST)
    parser.add_argument("--profile", action="store_true", help="also profile the fused forward by operator")

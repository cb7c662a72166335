"""Weights into a network: strict and safe."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor

from transkd.errors import UserError
from transkd.models.encoders.timm_encoder import TimmEncoder
from transkd.models.network import Network
from transkd.models.segmenter import Segmenter
from transkd.models.storage.formats import looks_like
from transkd.models.storage.lineage import describe_lineage, merge_lineage
from transkd.models.storage.sources import NVIDIA_NAMING, Weights, read_weights

__all__ = ["load_weights"]

log = logging.getLogger(__name__)

CLASSIFIERS = ("head.linear_pred.", "head.classifier.")


def load_weights(
    network: Network,
    source: str | Path | Weights,
    classifier: str = "same",
    license: str | None = None,
) -> None:
    """Load weights into a network: every tensor, or a clear error.

    What is not strict is a rule, and logged: an encoder alone (ImageNet) leaves the decode head at its random
    start; the authors' 20th output ("ignore") is dropped for 19 classes; ``classifier="new"`` leaves a classifier of
    another size at its random start. Normalisation and licence lineage come with the weights; those of an encoder alone
    leave a normalisation that was chosen.

    Args:
        network: to load into; left as it is when anything does not fit.
        source: see ``read_weights``, or what that gave.
        classifier: "same" or "new".
        license: of the weights, where they do not say themselves.

    Raises:
        UserError: names the first tensors that differ, and what the file looks like instead.
    """
    if classifier not in ("same", "new"):
        raise UserError(f"classifier is 'same' or 'new', got {classifier!r}")
    weights = source if isinstance(source, Weights) else read_weights(source)
    expected = network.state_dict()
    tensors = dict(weights.tensors if isinstance(network, Segmenter) else weights.original)
    if isinstance(network, Segmenter) and isinstance(network.encoder, TimmEncoder):
        tensors = _from_timm_names(network, tensors)
    encoder_alone = _complete_head(tensors, expected, weights.source)
    _drop_ignore_output(tensors, expected, weights.source)
    if classifier == "new":
        _renew_classifier(tensors, expected, weights.source)
    _check_fit(expected, tensors, network, weights)
    network.load_state_dict(tensors, strict=True)
    if "mean" in weights.card and not (encoder_alone and network.normalisation_chosen):
        network.mean.copy_(torch.tensor(weights.card["mean"]).view(3, 1, 1))
        network.std.copy_(torch.tensor(weights.card["std"]).view(3, 1, 1))
    network.lineage = _lineage(weights, license)
    log.info("%s: loaded %s; %s", network.name, weights.source, describe_lineage(network.lineage))


def _from_timm_names(network: Segmenter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A timm file's names -> those of timm's feature extractor; the classifier and what leads to it are left out."""
    ours = set(network.encoder.state_dict())
    if all(name.removeprefix("encoder.") in ours for name in tensors if not name.startswith("head.")):
        return tensors
    with torch.device("meta"):  # what the whole network has beyond the four stages
        whole = set(timm.create_model(network.encoder.architecture).state_dict())
    renamed = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("encoder.")
        flat = re.sub(r"^(\w+)\.(\d+)\.", r"\1_\2.", plain)
        found = next((full for full in (f"body.model.{plain}", f"body.{plain}", f"body.{flat}") if full in ours), None)
        if found is not None:
            renamed[f"encoder.{found}"] = tensor
        elif plain not in whole:
            renamed[name] = tensor  # foreign: to be named in the error
    return renamed


def _complete_head(tensors: dict[str, Tensor], expected: Mapping[str, Tensor], source: str) -> bool:
    """An encoder alone gets the head that the network has."""
    encoder = any(name.startswith("encoder.") for name in tensors)
    if not encoder or any(name.startswith("head.") for name in tensors):
        return False
    log.info("%s holds an encoder alone; the decode head starts from random weights", source)
    tensors.update({name: tensor for name, tensor in expected.items() if name.startswith("head.")})
    return True


def _drop_ignore_output(tensors: dict[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    for name in ("head.linear_pred.weight", "head.linear_pred.bias"):
        if name in tensors and name in expected and len(tensors[name]) == len(expected[name]) + 1 == 20:
            log.info("%s: dropped the 20th output (ignore) of %s", source, name)
            tensors[name] = tensors[name][:-1]


def _renew_classifier(tensors: dict[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    for name in expected:
        if name.startswith(CLASSIFIERS) and name in tensors and tensors[name].shape != expected[name].shape:
            log.info("%s: %s starts from random weights (classifier=new)", source, name)
            tensors[name] = expected[name]


def _check_fit(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], network: Network, weights: Weights) -> None:
    differing = [name for name in expected if name in got and expected[name].shape != got[name].shape]
    problems = [f"{name}: expected {list(expected[name].shape)}, got {list(got[name].shape)}" for name in differing]
    problems += [f"{name}: missing in the file" for name in expected if name not in got]
    problems += [f"{name}: not in the network" for name in got if name not in expected]
    if not problems:
        return
    if len(problems) == len(differing) and all(name.startswith(CLASSIFIERS) for name in differing):
        raise UserError(
            f"{weights.source} has {len(got[differing[0]])} classes, {network.name} was built for "
            f"{network.num_classes}: {problems[0]}. A student starts its classifier at random with "
            f"student.classifier=new; a teacher keeps its own with teacher.network.num_classes={len(got[differing[0]])}"
        )
    what = looks_like(got)
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise UserError(
        f"{weights.source} does not fit {network.name} with {network.num_classes} classes: "
        f"{'; '.join(problems[:3])}{more}. {f'It looks like {what}. ' if what else ''}"
        "Choose the network that the file was made with"
    )


def _lineage(weights: Weights, license: str | None) -> list[dict[str, str | None]]:
    """The weights' own; what nobody stated, or the naming alone suggests, takes the user's word."""
    entries = []
    for entry in weights.lineage:
        unsaid = entry["license"] is None or NVIDIA_NAMING in str(entry["source"])
        stated = license is not None and entry["part"] == "weights" and unsaid
        entries.append({**entry, "license": license} if stated else entry)
    return merge_lineage(entries)

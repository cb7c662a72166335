"""Strict loading of weights into a network."""

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
from transkd.models.storage.checks import check_values
from transkd.models.storage.formats import looks_like, without_wrappers
from transkd.models.storage.lineage import describe_lineage, merge_lineage
from transkd.models.storage.sources import NVIDIA_NAMING, Weights, read_weights

__all__ = ["CLASSIFIERS", "check_fit", "load_weights"]

log = logging.getLogger(__name__)

CLASSIFIERS = ("head.linear_pred.", "head.classifier.")
"""Beginnings of the names of classifiers' parameters in our networks."""


def load_weights(
    network: Network,
    source: str | Path | Weights,
    classifier: str = "same",
    license: str | None = None,
) -> None:
    """Load all tensors of a weights file into a network, or raise a `UserError`.

    Exceptions, each of which is logged: for encoder weights (ImageNet) the decode head keeps its random initialisation;
    the 20th output ("ignore") of the authors' checkpoints is dropped for 19 classes; with ``classifier="new"`` a
    classifier of another size keeps its random initialisation. Normalisation and licence lineage are loaded too;
    encoder weights do not replace a normalisation that was given explicitly.

    Args:
        network: the network; unchanged if there is an error.
        source: see ``read_weights``, or its result.
        classifier: "same" or "new".
        license: licence of the weights, used if the file does not state one.

    Raises:
        UserError: tensors differ; the message lists the first ones and what network the file seems to contain. Or
            values are damaged, see ``check_values``.
    """
    if classifier not in ("same", "new"):
        raise UserError(f"classifier must be 'same' or 'new', got {classifier!r}")
    weights = source if isinstance(source, Weights) else read_weights(source)
    expected = network.state_dict()
    tensors = dict(weights.tensors if isinstance(network, Segmenter) else weights.original)
    if not (isinstance(network, Segmenter) or expected.keys() & tensors.keys()):
        tensors = without_wrappers(tensors)
    if isinstance(network, Segmenter) and isinstance(network.encoder, TimmEncoder):
        tensors = _from_timm_names(network, tensors)
    encoder_alone = _complete_head(tensors, expected, weights.source)
    _drop_ignore_output(tensors, expected, weights.source)
    if classifier == "new":
        _renew_classifier(tensors, expected, weights.source)
    check_fit(expected, tensors, network, weights)
    check_values(tensors, expected, weights.source)
    network.load_state_dict(tensors, strict=True)
    if "mean" in weights.card and not (encoder_alone and network.normalisation_chosen):
        network.mean.copy_(torch.tensor(weights.card["mean"]).view(3, 1, 1))
        network.std.copy_(torch.tensor(weights.card["std"]).view(3, 1, 1))
    network.lineage = _lineage(weights, license)
    log.info("%s: loaded %s; %s", network.name, weights.source, describe_lineage(network.lineage))


def _from_timm_names(network: Segmenter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a timm file's tensors for timm's feature extractor; drop the classifier and layers before it."""
    ours = set(network.encoder.state_dict())
    if all(name.removeprefix("encoder.") in ours for name in tensors if not name.startswith("head.")):
        return tensors
    with torch.device("meta"):  # meta: only the names of the complete network are needed
        whole = set(timm.create_model(network.encoder.architecture).state_dict())
    renamed = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("encoder.")
        flat = re.sub(r"^(\w+)\.(\d+)\.", r"\1_\2.", plain)
        found = next((full for full in (f"body.model.{plain}", f"body.{plain}", f"body.{flat}") if full in ours), None)
        if found is not None:
            renamed[f"encoder.{found}"] = tensor
        elif plain not in whole:
            renamed[name] = tensor  # unknown: reported as an error later
    return renamed


def _complete_head(tensors: dict[str, Tensor], expected: Mapping[str, Tensor], source: str) -> bool:
    """Add the network's own head to encoder weights; return whether that was needed."""
    encoder = any(name.startswith("encoder.") for name in tensors)
    if not encoder or any(name.startswith("head.") for name in tensors):
        return False
    log.info("%s contains only an encoder; the decode head is initialised at random", source)
    tensors.update({name: tensor for name, tensor in expected.items() if name.startswith("head.")})
    return True


def _drop_ignore_output(tensors: dict[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    for name in ("head.linear_pred.weight", "head.linear_pred.bias"):
        if name in tensors and name in expected and tensors[name].shape[:1] == (20,) and len(expected[name]) == 19:
            log.info("%s: dropped the 20th output (ignore) of %s", source, name)
            tensors[name] = tensors[name][:-1]


def _renew_classifier(tensors: dict[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    for name in expected:
        if name.startswith(CLASSIFIERS) and name in tensors and tensors[name].shape != expected[name].shape:
            log.info("%s: %s is initialised at random (classifier=new)", source, name)
            tensors[name] = expected[name]


def check_fit(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], network: Network, weights: Weights) -> None:
    """Compare names and shapes of a file's tensors with a network's.

    Raises:
        UserError: they differ; the message lists the first differences.
    """
    differing = [name for name in expected if name in got and expected[name].shape != got[name].shape]
    problems = [f"{name}: expected {list(expected[name].shape)}, got {list(got[name].shape)}" for name in differing]
    problems += [f"{name}: missing in the file" for name in expected if name not in got]
    problems += [f"{name}: not in the network" for name in got if name not in expected]
    if not problems:
        return
    classifiers = all(name.startswith(CLASSIFIERS) and got[name].ndim == expected[name].ndim for name in differing)
    if len(problems) == len(differing) and classifiers:
        raise UserError(
            f"{weights.source} has {len(got[differing[0]])} classes, {network.name} was built for "
            f"{network.num_classes}: {problems[0]}. For a student with a new classifier set student.classifier=new; "
            f"for a teacher with the file's classes set teacher.network.num_classes={len(got[differing[0]])}"
        )
    what = looks_like(got)
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise UserError(
        f"{weights.source} does not fit {network.name} with {network.num_classes} classes: "
        f"{'; '.join(problems[:3])}{more}. {f'It looks like {what}. ' if what else ''}"
        "Choose the network that the file was written from"
    )


def _lineage(weights: Weights, license: str | None) -> list[dict[str, str | None]]:
    """Return the weights' lineage; ``license`` fills in licences that are unknown or only inferred from the naming."""
    entries = []
    for entry in weights.lineage:
        unstated = entry["license"] is None or NVIDIA_NAMING in str(entry["source"])
        stated = license is not None and entry["part"] == "weights" and unstated
        entries.append({**entry, "license": license} if stated else entry)
    return merge_lineage(entries)

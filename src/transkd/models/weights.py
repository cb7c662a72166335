"""Weights in and out: what a file holds is told from its content, loading is strict and safe."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import transkd
from transkd.errors import UserError
from transkd.files import write_atomically
from transkd.models.factory import create_segmenter
from transkd.models.segmenter import Segmenter
from transkd.models.transkd_checkpoint import split_transkd_checkpoint

__all__ = [
    "describe",
    "load_segmenter",
    "load_weights",
    "read_weights",
    "save_segmenter",
    "split_transkd_checkpoint",
]

log = logging.getLogger(__name__)

CARD = "transkd"
"""The key under which our files describe their network: in safetensors metadata as JSON, in checkpoints as a dict."""


def describe(network: Segmenter, classes: tuple[Any, Any] | None = None, **notes: Any) -> dict[str, Any]:
    """What a file must say so that its network can be built and used again without any config."""
    card: dict[str, Any] = {
        "transkd_version": transkd.__version__,
        "name": network.name,
        "num_classes": network.num_classes,
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        **notes,
    }
    if classes is not None:
        card["class_names"], card["palette"] = [list(part) for part in classes]
    return card


def save_segmenter(network: Segmenter, path: str | Path, classes: tuple[Any, Any] | None = None, **notes: Any) -> None:
    """Write the plain network and its description to one safetensors file, whole or not at all.

    Args:
        network: built by ``create_segmenter``.
        path: file to write; replaced only once the new one is complete.
        classes: names and palette (``transkd.data.classes.ClassSet``), for pictures and tables later.
        notes: anything else worth keeping that JSON can hold.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata={CARD: json.dumps(describe(network, classes, **notes))})
    write_atomically(path, content)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The student's tensors in a file, under our names where the format is known, and its card (empty if foreign).

    Known by content: our ``student.safetensors``, our Lightning checkpoints, MiT checkpoints in the published naming
    (ImageNet encoders and whole SegFormers), TransKD checkpoints of the authors. Pickles are read with
    ``weights_only=True``: nothing in them is executed.

    Raises:
        UserError: no such file, or one that holds no readable weights.
    """
    content, card = _read_file(Path(path))
    tensors: Any = content
    for wrapper in ("state_dict", "model"):
        if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapper), Mapping):
            tensors = tensors[wrapper]
    tensors = {k: v for k, v in tensors.items() if isinstance(v, Tensor)} if isinstance(tensors, Mapping) else {}
    if not tensors:
        raise UserError(f"{path} holds no weights: expected a mapping of names to tensors")
    return _our_names(tensors), card


def _read_file(path: Path) -> tuple[Any, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"weights file not found: {path}")
    with path.open("rb") as file:
        start = file.read(16)
    # A safetensors file begins with the length of its JSON header (8 bytes) and the header's brace.
    if start[8:9] == b"{":
        try:
            with safetensors.safe_open(path, framework="pt") as archive:
                tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
                return tensors, json.loads((archive.metadata() or {}).get(CARD, "{}"))
        except (safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is a damaged safetensors file ({error}); copy or download it again") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged bytes torch raises whatever its parser trips over
        raise UserError(
            f"{path} is no readable weights file: expected safetensors or a PyTorch checkpoint of plain tensors, got "
            f"{path.stat().st_size} bytes that are damaged, foreign or hold other objects "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    return content, dict(content.get(CARD, {})) if isinstance(content, Mapping) else {}


def _our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.encoder.")}
    if ours:  # our Lightning checkpoint
        ours.update({k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.head.")})
        return ours
    plain = {k.removeprefix("module."): v for k, v in tensors.items()}
    if "student.patch_embed1.proj.weight" in plain:  # the authors' distillation checkpoint
        return split_transkd_checkpoint(plain)["student"]
    if "patch_embed1.proj.weight" in plain:  # MiT alone (ImageNet, with its classifier) or a whole SegFormer
        plain = {k: v for k, v in plain.items() if k not in ("head.weight", "head.bias")}
        return split_transkd_checkpoint({f"student.{k}": v for k, v in plain.items()})["student"]
    return tensors


def load_weights(network: Segmenter, path: str | Path) -> None:
    """Load a file into a network: every tensor, or a clear error.

    Two explicit rules, both logged: an encoder alone (ImageNet) leaves the decode head at its random start; a
    classifier with one row more than the network has (the authors' 20th output, "ignore") loses its last row.
    A file of ours brings its normalisation with it.

    Raises:
        UserError: names the first tensors that differ.
    """
    tensors, card = read_weights(path)
    expected = network.state_dict()
    if any(k.startswith("encoder.") for k in tensors) and not any(k.startswith("head.") for k in tensors):
        log.info("%s holds an encoder alone; the decode head starts from random weights", path)
        tensors = {**{k: v for k, v in expected.items() if k.startswith("head.")}, **tensors}
    for name in ("head.linear_pred.weight", "head.linear_pred.bias"):
        if name in tensors and name in expected and len(tensors[name]) == len(expected[name]) + 1 == 20:
            log.info("%s: dropped the 20th output (ignore) of %s", path, name)
            tensors[name] = tensors[name][:-1]
    _check_fit(expected, tensors, network, path)
    network.load_state_dict(tensors, strict=True)
    if card:
        network.mean.copy_(torch.tensor(card["mean"]).view(3, 1, 1))
        network.std.copy_(torch.tensor(card["std"]).view(3, 1, 1))


def _check_fit(expected: dict[str, Tensor], got: dict[str, Tensor], network: Segmenter, path: str | Path) -> None:
    differing = [
        f"{name}: expected {list(expected[name].shape)}, got {list(got[name].shape)}"
        for name in expected
        if name in got and expected[name].shape != got[name].shape
    ]
    missing = [f"{name}: missing in the file" for name in expected if name not in got]
    unexpected = [f"{name}: not in the network" for name in got if name not in expected]
    problems = differing + missing + unexpected
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{path} does not fit {network.name or 'this network'} with {network.num_classes} classes: "
            f"{'; '.join(problems[:3])}{more}. Choose the network that the file was made with"
        )


def load_segmenter(path: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """Build the network that a file of ours describes, with its weights; gives the network and the card.

    Raises:
        UserError: the file says nothing of its network (build it with ``create_segmenter(..., weights=path)``).
    """
    _, card = read_weights(path)
    if not card.get("name"):
        raise UserError(
            f"{path} does not say which network it holds, so it is no file of transkd's; "
            "give the network: from Python create_segmenter(name, num_classes, weights=path)"
        )
    return create_segmenter(card["name"], card["num_classes"], weights=path), card

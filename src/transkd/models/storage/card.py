"""Description of a network inside its weights file, from which it can be rebuilt without a configuration.

A card that is read is data from strangers: only the entries below are taken, of the types below. Nothing is imported,
opened or fetched because a card says so.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

import transkd
from transkd.errors import UserError
from transkd.models.network import Network

__all__ = ["CARD", "HASH", "describe", "fingerprint", "read_card"]

CARD = "transkd"
"""Key of the description: in safetensors metadata as JSON, in checkpoints as a dict."""

HASH = "sha256"
"""Key in the description of the hash over the tensors and the rest of the description, see ``fingerprint``."""

OWN = {"transkd", "timm", "torch", "torchvision", "__main__"}


def describe(network: Network, classes: tuple[Any, Any] | None = None, **notes: Any) -> dict[str, Any]:
    """Return the description of a network.

    Args:
        network: the network.
        classes: names and palette (``transkd.data.ClassSet``), if known.
        notes: additional entries, serialisable as JSON.
    """
    card: dict[str, Any] = {
        "transkd_version": transkd.__version__,
        "name": network.name,
        "num_classes": network.num_classes,
        "recipe": network.recipe,
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "lineage": network.lineage,
        **notes,
    }
    parts = [type(part).__module__.split(".")[0] for part in network.children()]
    plugins = sorted({module for module in parts if module not in OWN})
    if network.recipe is not None and plugins:
        card["plugins"] = plugins
    if classes is not None:
        card["class_names"], card["palette"] = [list(part) for part in classes]
    return card


def fingerprint(tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and values of tensors and over a card without its own hash.

    Example:
        >>> fingerprint({"weight": torch.zeros(2)}, {}) == fingerprint({"weight": torch.zeros(2, 1)}, {})
        False
    """
    rest = {key: value for key, value in card.items() if key != HASH}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode(errors="surrogatepass"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# What is taken from a card

MOST_CLASSES = 65535
MOST_TEXT = 1000
MOST_BLOCKS = 512
DEPTHS = ("depth", "depths", "layers", "num_blocks")
WORD = re.compile(r"[\w.+-]{1,100}")


def _printable(text: str) -> str:
    """Replace line breaks and control characters, which could write over a terminal or a model card."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _word(text: str) -> str:
    if not WORD.fullmatch(text):
        raise ValueError("expected a name of letters, digits, '_', '.', '+' and '-'")
    return text


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        _word(key)
        _check_argument(value)
        if key in DEPTHS:
            counts = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
            if sum(counts) > MOST_BLOCKS or min(counts, default=0) < 0:
                raise ValueError(f"expected 0 to {MOST_BLOCKS} blocks")
    return values


def _check_argument(value: Any, depth: int = 0) -> None:
    """Require a number, a word, null, or lists of them, of sizes that a network has."""
    if isinstance(value, list) and len(value) <= 64 and depth < 3:
        for part in value:
            _check_argument(part, depth + 1)
    elif isinstance(value, str):
        _word(value)
    elif not (value is None or (isinstance(value, int | float) and abs(value) <= MOST_CLASSES)):  # NaN fails too
        raise ValueError("expected numbers up to 65535, words, or lists of them")


Text = Annotated[str, Field(max_length=MOST_TEXT), AfterValidator(_printable)]
Word = Annotated[str, AfterValidator(_word)]
Size = Annotated[int, Field(ge=1, le=MOST_CLASSES)]
Shift = Annotated[float, Field(ge=-1e4, le=1e4)]
Spread = Annotated[float, Field(ge=1e-4, le=1e4)]
Colour = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]


class _Data(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class _Recipe(_Data):
    """Arguments of ``create_segmenter``; any other one, such as its ``weights``, is refused."""

    model_config = ConfigDict(extra="forbid")

    name: Word
    num_classes: Size
    head: Word | None = None
    width: Size | None = None
    encoder: Annotated[dict[str, Any], AfterValidator(_arguments)] | None = None
    scale: Annotated[float, Field(ge=1 / 64, le=16)] = 1.0


class _Origin(_Data):
    part: Literal["code", "weights", "teacher"]
    source: Text
    license: Text | None = None


class _Card(_Data):
    transkd_version: Text | None = None
    name: Text | None = None
    num_classes: Annotated[int, Field(ge=0, le=MOST_CLASSES)] | None = None
    recipe: _Recipe | None = None
    mean: Annotated[list[Shift], Field(min_length=3, max_length=3)] | None = None
    std: Annotated[list[Spread], Field(min_length=3, max_length=3)] | None = None
    lineage: Annotated[list[_Origin], Field(max_length=1000)] | None = None
    class_names: Annotated[list[Text], Field(max_length=MOST_CLASSES)] | None = None
    palette: Annotated[list[Colour], Field(max_length=256)] | None = None
    eval_transform: dict[str, Any] | None = None  # built from a list of its own, see resizing.py
    plugins: Annotated[list[Word], Field(max_length=100)] | None = None


def read_card(raw: Any, source: str) -> dict[str, Any]:
    """Check a card and return what is taken from it.

    Args:
        raw: the card, as JSON text or as the mapping in a checkpoint.
        source: the file, for messages.

    Returns:
        The known entries of ``describe``, and other entries of plain text and numbers, which are only shown.

    Raises:
        UserError: it is not a mapping, or an entry has another type or is out of range.
    """
    try:
        # a checkpoint's mapping is copied through JSON: tuples to lists, and no object of any other kind
        content = json.loads(raw if isinstance(raw, str) else json.dumps(raw))
        card = _Card.model_validate(content).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = _printable(".".join(map(str, first["loc"])))[:100] or "it"
        reason = f"{where}: {first['msg'].removeprefix('Value error, ')}"
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = _printable(str(error))[:200]
    else:
        known = {key: value for key, value in card.items() if value is not None or key == "recipe"}
        if ("mean" in known) == ("std" in known):
            return known | {_printable(key): note for key, note in content.items() if _is_note(key, note)}
        reason = "of mean and std it has one alone"
    raise UserError(
        f"{source}: the description of its network (its card) is damaged or not by transkd ({reason}); copy or "
        "download the file again"
    )


def _is_note(key: str, value: Any) -> bool:
    if key in _Card.model_fields or key == HASH or len(key) > 100:
        return False
    if isinstance(value, str):
        return len(value) <= MOST_TEXT and value.isprintable()
    return value is None or (isinstance(value, int | float) and abs(value) < 2**63 and math.isfinite(value))

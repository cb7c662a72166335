"""What a file of weights holds, told from the names and shapes of its tensors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from transkd.errors import UserError
from transkd.models.catalog import SEGMENTERS
from transkd.models.network import IMAGENET_MEAN, IMAGENET_STD
from transkd.models.storage.formats import guess_segformer, rename_to_ours
from transkd.models.storage.lineage import CODE, Lineage

__all__ = ["NVIDIA", "NVIDIA_NAMING", "Weights", "origin", "recognise"]

NVIDIA = "NVIDIA Source Code License for SegFormer (non-commercial)"
NVIDIA_NAMING = "SegFormer authors' checkpoint naming"


class Weights(NamedTuple):
    """Weights with their description.

    Attributes:
        source: the source as given by the user, for messages.
        kind: the format: "transkd", "authors", "mit", "mmseg", "huggingface", "smp", "timm" or "unknown".
        tensors: tensors under our names if the format is known, otherwise under their original names.
        original: tensors under the names in the file.
        card: known properties of the network: name, num_classes, mean, std, class_names, …; complete in our files.
        lineage: origins and licences of code and weights.
    """

    source: str
    kind: str
    tensors: dict[str, Tensor]
    original: dict[str, Tensor]
    card: dict[str, Any]
    lineage: Lineage

    @property
    def recipe(self) -> dict[str, Any] | None:
        """Arguments of ``create_segmenter`` that rebuild the network, or None if the file does not contain them."""
        if "recipe" in self.card:
            return self.card["recipe"]
        named: dict[str, Any] = {key: self.card[key] for key in ("name", "num_classes") if key in self.card}
        return named or None


def origin(source: str, license: str | None = None) -> dict[str, str | None]:
    """Return the lineage entry of weights."""
    return {"part": "weights", "source": source, "license": license}


def recognise(source: str, tensors: Mapping[str, Tensor], license: str | None = None) -> Weights:
    """Build `Weights` for a file of another library, with the properties that its format implies.

    Raises:
        UserError: the names are of a known format, the shapes are not.
    """
    try:
        kind, renamed = rename_to_ours(tensors)
        name, classes = guess_segformer(renamed)
        fuse = renamed.get("head.linear_fuse.conv.weight")
        width = None if fuse is None else fuse.shape[0]
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source} is damaged: its tensors have names of a known format, but not its shapes ({reason}); copy or "
            "download it again"
        ) from error
    if kind == "authors" and classes == 20:  # loading drops the last output, "ignore"
        classes = 19
    card: dict[str, Any] = {}
    if name and classes:
        card = {"name": name, "num_classes": classes}
        if width and width != SEGMENTERS[name].width:
            card["recipe"] = {**card, "width": width}
    entry = origin(source, license)
    if kind in ("mit", "mmseg", "authors"):
        entry = origin(f"{source}, {NVIDIA_NAMING}", license or NVIDIA)
    if kind == "authors":  # their recipe uses RGB in [0, 1] without normalisation
        card |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    elif kind in ("mit", "mmseg", "huggingface", "smp"):
        card |= {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    return Weights(source, kind, renamed, dict(tensors), card, [CODE, entry])

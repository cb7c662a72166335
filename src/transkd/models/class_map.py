"""A network whose classes are mapped to others: merged, dropped, reordered."""

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.models.network import Network
from transkd.outputs import EVERYTHING, SegmentationOutput

__all__ = ["ClassMap", "MappedClasses", "map_logits", "read_class_map", "unmapped"]

ClassMap = Mapping[str | int, Sequence[str | int] | str | int]
"""Classes of a teacher, by name or id, for each of ours; a single one needs no list."""


class MappedClasses(Network):
    """A network that shows other classes than its own; everything but its logits is unchanged.

    Args:
        network: the network; weights are loaded into it, not into this one.
        sources: for each class shown, the ids of the network's classes that it stands for; see ``read_class_map``.

    Attributes:
        network: the network with its own classes.
        sources: as given.

    Example:
        >>> from transkd.models import create_segmenter
        >>> teacher = create_segmenter("segformer_b0", num_classes=5)
        >>> MappedClasses(teacher, [[0, 3], [4]]).eval()(torch.zeros(1, 3, 64, 64)).logits.shape
        torch.Size([1, 2, 16, 16])
    """

    def __init__(self, network: Network, sources: Sequence[Sequence[int]]) -> None:
        nn.Module.__init__(self)  # not Network's: the normalisation is the network's own, and may be loaded later
        self.network = network
        self.name, self.recipe = network.name, None
        self.channels, self.num_classes = network.channels, len(sources)
        self.sources = [list(ids) for ids in sources]

    def __getattr__(self, name: str) -> Any:
        """Take what loading weights may change from the network."""
        if name in ("mean", "std", "scale", "lineage", "normalisation_chosen"):
            return getattr(self.network, name)
        return super().__getattr__(name)

    def forward(self, image: Tensor, needs: Collection[str] = EVERYTHING) -> SegmentationOutput:
        """Run the network and map its logits."""
        output: SegmentationOutput = self.network(image, needs)
        if output.logits is None:
            return output
        return output._replace(logits=map_logits(output.logits, self.sources))


def map_logits(logits: Tensor, sources: Sequence[Sequence[int]]) -> Tensor:
    """Map logits [B, K, h, w] to [B, len(sources), h, w].

    The logit of a class is the logarithm of the sum of exp over its sources, so its probability is the sum of theirs,
    divided by that of all classes that are not dropped. A class with one source keeps its logit exactly.

    Example:
        >>> logits = torch.tensor([0.5, 0.3, 0.2]).log().view(1, 3, 1, 1)
        >>> map_logits(logits, [[0], [1, 2]]).softmax(1).flatten()
        tensor([0.5000, 0.5000])
        >>> map_logits(logits, [[2], [1]]).softmax(1).flatten()  # the first is dropped
        tensor([0.4000, 0.6000])
    """
    return torch.stack([logits[:, list(ids)].logsumexp(1) for ids in sources], dim=1)


def unmapped(network: Network) -> Network:
    """The network with its own classes."""
    return network.network if isinstance(network, MappedClasses) else network


def read_class_map(
    class_map: ClassMap, ours: Sequence[str], theirs: Sequence[str] | None, count: int
) -> list[list[int]]:
    """Ids of the teacher's classes for each of ours; classes of the teacher that are not named are dropped.

    Args:
        class_map: teacher's classes by name or id, for each of our classes by name or id.
        ours: names of our classes.
        theirs: names of the teacher's classes, if its weights name them.
        count: number of the teacher's classes.

    Raises:
        UserError: one of our classes has none of the teacher's, a class is unknown, or one of the teacher's is named
            twice.

    Example:
        >>> read_class_map({"flat": ["road", 1], "object": "car"}, ["object", "flat"], ["road", "sidewalk", "car"], 3)
        [[2], [0, 1]]
    """
    if theirs is not None and len(theirs) != count:
        raise UserError(
            f"teacher.class_map: the teacher's weights have {len(theirs)} classes, its network {count}; set "
            f"teacher.network.num_classes={len(theirs)}"
        )
    sources: list[list[int]] = [[] for _ in ours]
    for mine, named in class_map.items():
        listed = [named] if isinstance(named, str | int) else list(named)
        sources[_class_id(mine, ours, len(ours), "our")] += [
            _class_id(one, theirs, count, "the teacher's") for one in listed
        ]
    missing = [name for name, ids in zip(ours, sources, strict=True) if not ids]
    if missing:
        raise UserError(
            f"teacher.class_map: no class of the teacher for {', '.join(missing)}; expected at least one for each of "
            "ours. Without one, choose terms that read only features or embeddings (csf, pea, ea, gl_mixer)"
        )
    used = [one for ids in sources for one in ids]
    twice = sorted({one for one in used if used.count(one) > 1})
    if twice:
        names = [theirs[one] if theirs is not None else str(one) for one in twice]
        raise UserError(f"teacher.class_map: the teacher's class {', '.join(names)} is given twice; expected once")
    return sources


def _class_id(given: str | int, names: Sequence[str] | None, count: int, whose: str) -> int:
    if isinstance(given, str):
        if names is None:
            raise UserError(
                f"teacher.class_map: the teacher's weights do not name their classes, so {given!r} is unknown; give "
                f"ids from 0 to {count - 1}"
            )
        if given not in names:
            near = get_close_matches(given, names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"teacher.class_map: {given!r} is not among {whose} classes; {hint}there are: {', '.join(names)}"
            )
        return list(names).index(given)
    if not 0 <= given < count:
        more = "; the number of the teacher's classes is teacher.network.num_classes" if whose != "our" else ""
        raise UserError(f"teacher.class_map: {given} is not among {whose} classes 0…{count - 1}{more}")
    return given

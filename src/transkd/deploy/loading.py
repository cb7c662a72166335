"""Load the network that a command runs or exports."""

from typing import Any

from transkd.errors import UserError
from transkd.models import Segmenter, create_segmenter, load_segmenter, load_weights
from transkd.models.storage.card import describe
from transkd.models.storage.sources import read_weights
from transkd.settings import NetworkSettings

__all__ = ["load_network"]


def load_network(
    source: str, settings: NetworkSettings, license: str | None = None
) -> tuple[Segmenter, dict[str, Any]]:
    """Build a network as its file or ``settings`` say, and load its weights; return it with its card.

    Args:
        source: see ``read_weights``.
        settings: the network, for weights that do not say it; takes precedence where a name is given.
        license: licence of the weights, if they do not state it.

    Raises:
        UserError: the network is not known, or the weights are damaged or do not fit.
    """
    if settings.name is None:
        stated = settings.model_dump(exclude_defaults=True)
        if stated:
            raise UserError(f"network.{next(iter(stated))} needs network.name too, such as network.name=segformer_b0")
        network, card = load_segmenter(source, license)
        return network, {**card, **describe(network)}
    weights = read_weights(source)
    arguments = settings.model_dump(exclude_defaults=True)
    classes = arguments.setdefault("num_classes", weights.card.get("num_classes"))
    if classes is None:
        raise UserError(f"{source} does not say its number of classes; set network.num_classes=…")
    if not any(name.startswith("head.") for name in weights.tensors):
        raise UserError(
            f"{source} has no tensors of a decode head (head.…), so it cannot predict; expected a whole network"
        )
    network = create_segmenter(**arguments)
    load_weights(network, weights, license=license)
    return network, {**weights.card, **describe(network)}

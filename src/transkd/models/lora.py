"""Low-rank adaptation: a network whose weights stay while small terms beside them are trained."""

import math
from collections.abc import Collection, Mapping

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.layers.token_linear import token_linear

__all__ = ["LoRALinear", "add_lora", "fold_lora", "merge_lora"]

ADAPTED = {
    "attn": {"q": 1, "k": 1, "v": 1, "kv": 2, "qkv": 3, "proj": 1},
    "mlp": {"fc1": 1, "fc2": 1},
}
"""Layers of a block that get low-rank terms, and how many matrices of as many outputs each holds."""


class LoRALinear(nn.Module):
    """A linear layer that stays as it is, and a low-rank term that is trained.

    ``y = W·x + b + B·(A·x)`` without a scaling. A layer that holds several matrices one above the other, such as a
    fused ``qkv``, has a pair of its own for each: ``[B_q·A_q; B_k·A_k; B_v·A_v]·x``. A starts uniform in ±1/√in and
    B at 0, so that the layer starts as it was; at the first step A has no gradient.

    Its ``weight`` and ``bias`` keep their names, so that the layer's own weights load into it.

    Source: Hu et al., arXiv 2106.09685, section 4.1; scaling and start are WeCoLoRA's (arXiv 2404.09326).

    Args:
        linear: the layer; its parameters are shared and frozen.
        rank: rows of A; more than the layer is wide adds nothing.
        parts: matrices that the layer holds.

    Shapes:
        [..., in] -> [..., out].

    Example:
        >>> layer = nn.Linear(8, 24)
        >>> adapted = LoRALinear(layer, rank=2, parts=3)
        >>> {name: tuple(tensor.shape) for name, tensor in adapted.state_dict().items()}
        {'weight': (24, 8), 'bias': (24,), 'lora_a': (3, 2, 8), 'lora_b': (3, 8, 2)}
    """

    def __init__(self, linear: nn.Linear, rank: int, parts: int = 1) -> None:
        super().__init__()
        if rank < 1:
            raise UserError(f"The rank of a low-rank term must be 1 or more; got {rank}.")
        if parts < 1 or linear.out_features % parts:
            raise UserError(f"A layer of {linear.out_features} outputs does not hold {parts} matrices of equal size.")
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.lora_a = nn.Parameter(linear.weight.new_empty(parts, rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(parts, linear.out_features // parts, rank))
        bound = 1 / math.sqrt(linear.in_features)
        nn.init.uniform_(self.lora_a, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with its low-rank term."""
        parts, rank, _ = self.lora_a.shape
        low = token_linear(x, self.lora_a.flatten(0, 1)).view(*x.shape[:-1], parts, rank)
        return token_linear(x, self.weight, self.bias) + torch.einsum("...pr,por->...po", low, self.lora_b).flatten(-2)

    def merge(self) -> nn.Linear:
        """A plain layer of the same output, its weight ``W + B·A``; it can be trained."""
        rows, columns = self.weight.shape
        linear = nn.Linear(columns, rows, bias=self.bias is not None, device="meta", dtype=self.weight.dtype)
        linear.weight = nn.Parameter(_sum(self.weight.detach(), self.lora_a.detach(), self.lora_b.detach()))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach())
        return linear.train(self.training)


def add_lora(network: nn.Module, rank: int, train: Collection[str] = (), keep_drop_path: bool = False) -> None:
    """Freeze a network and give the attention and MLP layers of its encoder's blocks low-rank terms to train.

    Adapted are the linear layers ``q``, ``k``, ``v``, ``kv``, ``qkv`` and ``proj`` of modules called ``attn``, and
    ``fc1`` and ``fc2`` of those called ``mlp``: MiT's and those of timm's PVTv2 and Swin. All else stays as it is,
    patch embeddings, norms, spatial reductions and depth-wise convolutions; running statistics of a BatchNorm go on
    in training all the same. To be called before the optimiser is built.

    Source: WeCoLoRA, arXiv 2404.09326, with a rank of 128. Keys and values of MiT are split into
    two matrices, as is done there for queries, keys and values in one.

    Args:
        network: changed in place; low-rank terms go below ``network.encoder``.
        rank: of every term.
        train: names of modules that are trained as a whole, such as ("head",) for one that starts at random.
        keep_drop_path: whether stochastic depth goes on; else it is set to 0, as copied weights do not need it.

    Raises:
        UserError: no such layer, terms that are there already, an unknown module in ``train``, or no proper rank.

    Example:
        >>> from transkd.models import create_segmenter
        >>> network = create_segmenter("segformer_b0", num_classes=5)
        >>> add_lora(network, rank=4)
        >>> sum(p.numel() for p in network.parameters() if p.requires_grad)
        73728
    """
    if any(isinstance(module, LoRALinear) for module in network.modules()):
        raise UserError("The network has low-rank terms already; fold them into its weights first (merge_lora).")
    names = [name for name, _ in network.named_modules()]
    for name in train:
        if name not in names or not name:
            raise UserError(f"There is no module {name!r} in the network to train beside the low-rank terms.")
    layers = _layers(network)
    if not layers:
        raise UserError(
            f"{type(getattr(network, 'encoder', network)).__name__} has no linear layers attn.{{q,kv,qkv,proj}} or "
            "mlp.{fc1,fc2} in an encoder that could be adapted; choose a transformer, such as segformer_b1"
        )
    adapted = {name: LoRALinear(layer, rank, parts) for name, (layer, parts) in layers.items()}
    network.requires_grad_(False)
    for name, layer in adapted.items():
        _replace(network, name, layer)
        layer.lora_a.requires_grad_(True)
        layer.lora_b.requires_grad_(True)
    for name in train:
        network.get_submodule(name).requires_grad_(True)
    if not keep_drop_path:
        for module in network.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0


def merge_lora(network: nn.Module) -> None:
    """Fold the low-rank terms into the weights beside them: the plain network again, with the same output.

    Its ``state_dict`` is the plain network's, and all its parameters can be trained. A network without low-rank terms
    stays as it is. For a network that goes on being trained, merge a copy: ``merge_lora(copy.deepcopy(network))``.

    Args:
        network: changed in place.

    Example:
        >>> from transkd.models import create_segmenter
        >>> network = create_segmenter("segformer_b0", num_classes=5)
        >>> names = list(network.state_dict())
        >>> add_lora(network, rank=4)
        >>> merge_lora(network)
        >>> list(network.state_dict()) == names
        True
    """
    adapted = [(name, module) for name, module in network.named_modules() if isinstance(module, LoRALinear)]
    if adapted:
        network.requires_grad_(True)
    for name, layer in adapted:
        _replace(network, name, layer.merge())


def fold_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``merge_lora`` does, for the tensors of a file: those of the plain network, bit for bit.

    Args:
        tensors: a network's ``state_dict``, with low-rank terms or without.

    Example:
        >>> layer = {"fc.weight": torch.zeros(2, 3), "fc.lora_a": torch.ones(1, 4, 3), "fc.lora_b": torch.ones(1, 2, 4)}
        >>> fold_lora(layer)
        {'fc.weight': tensor([[4., 4., 4.],
                [4., 4., 4.]])}
    """
    folded = dict(tensors)
    for layer in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        a, b = folded.pop(f"{layer}.lora_a"), folded.pop(f"{layer}.lora_b")
        folded[f"{layer}.weight"] = _sum(folded[f"{layer}.weight"], a, b)
    return folded


def _sum(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``W + B·A``, each matrix that W holds with its own pair."""
    return weight + (b @ a).flatten(0, 1)


def _layers(network: nn.Module) -> dict[str, tuple[nn.Linear, int]]:
    """The encoder's layers to adapt by their names, with how many matrices each holds."""
    found = {}
    for name, module in getattr(network, "encoder", nn.Module()).named_modules(prefix="encoder"):
        parent, _, own = name.rpartition(".")
        parts = ADAPTED.get(parent.rpartition(".")[2], {}).get(own)
        if parts is not None and isinstance(module, nn.Linear):
            found[name] = module, parts
    return found


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)

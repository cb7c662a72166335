"""Low-rank adaptation (LoRA): the weights of a network are frozen, added low-rank terms are trained."""

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
"""Layers of a block that get low-rank terms, with the number of stacked matrices in each."""


class LoRALinear(nn.Module):
    """Frozen linear layer with a trainable low-rank term.

    ``y = W·x + b + B·(A·x)`` without scaling. A layer with several stacked matrices, such as a fused ``qkv``, has a
    pair (A, B) for each: ``[B_q·A_q; B_k·A_k; B_v·A_v]·x``. A is initialised uniformly in ±1/√in, B with 0, so the
    output is initially unchanged and A's gradient is 0 at the first step.

    ``weight`` and ``bias`` keep their names, so that weights of the linear layer can be loaded.

    Source: Hu et al., arXiv 2106.09685, section 4.1; scaling and initialisation as in WeCoLoRA (arXiv 2404.09326).

    Args:
        linear: the layer; its parameters are shared, not copied, and frozen.
        rank: rows of A; a rank above the layer's width has no benefit.
        parts: number of stacked matrices in the layer.

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
        """Apply the layer and its low-rank term."""
        parts, rank, _ = self.lora_a.shape
        low = token_linear(x, self.lora_a.flatten(0, 1)).view(*x.shape[:-1], parts, rank)
        return token_linear(x, self.weight, self.bias) + torch.einsum("...pr,por->...po", low, self.lora_b).flatten(-2)

    def merge(self) -> nn.Linear:
        """Return a plain trainable linear layer with the weight ``W + B·A``."""
        rows, columns = self.weight.shape
        linear = nn.Linear(columns, rows, bias=self.bias is not None, device="meta", dtype=self.weight.dtype)
        linear.weight = nn.Parameter(_sum(self.weight.detach(), self.lora_a.detach(), self.lora_b.detach()))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach())
        return linear.train(self.training)


def add_lora(network: nn.Module, rank: int, train: Collection[str] = (), keep_drop_path: bool = False) -> None:
    """Freeze a network and add trainable low-rank terms to the attention and MLP layers of its encoder.

    Adapted are the linear layers ``q``, ``k``, ``v``, ``kv``, ``qkv`` and ``proj`` of modules called ``attn``, and
    ``fc1`` and ``fc2`` of modules called ``mlp``, as in MiT and timm's PVTv2 and Swin. Patch embeddings, norms, spatial
    reductions and depth-wise convolutions are only frozen; running statistics of BatchNorm are still updated in
    training mode. Call it before building the optimiser.

    Source: WeCoLoRA, arXiv 2404.09326, with rank 128. The fused keys and values of MiT get a term each, as the fused
    queries, keys and values do there.

    Args:
        network: modified in place, in ``network.encoder``.
        rank: rank of every term.
        train: names of modules that stay trainable, such as ("head",) for a randomly initialised head.
        keep_drop_path: whether to keep stochastic depth; otherwise it is set to 0.

    Raises:
        UserError: there is no such layer, the network already has low-rank terms, a module in ``train`` is unknown, or
            the rank is below 1.

    Example:
        >>> from transkd.models import create_segmenter
        >>> network = create_segmenter("segformer_b0", num_classes=5)
        >>> add_lora(network, rank=4)
        >>> sum(p.numel() for p in network.parameters() if p.requires_grad)
        73728
    """
    if any(isinstance(module, LoRALinear) for module in network.modules()):
        raise UserError("The network has low-rank terms already; merge them into its weights first (merge_lora).")
    names = [name for name, _ in network.named_modules()]
    for name in train:
        if name not in names or not name:
            raise UserError(f"There is no module {name!r} in the network to train with the low-rank terms.")
    layers = _layers(network)
    if not layers:
        raise UserError(
            f"{type(getattr(network, 'encoder', network)).__name__} has no linear layers attn.{{q,kv,qkv,proj}} or "
            "mlp.{fc1,fc2} in an encoder to adapt; choose a transformer, such as segformer_b1"
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
    """Merge the low-rank terms into the weights; the output stays the same.

    Afterwards the ``state_dict`` is that of the plain network and all parameters require grad. A network without
    low-rank terms is not changed. To continue training the terms, merge a copy: ``merge_lora(copy.deepcopy(network))``.

    Args:
        network: modified in place.

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
    """Merge low-rank terms in a ``state_dict``, with bitwise the same result as ``merge_lora``.

    Args:
        tensors: a network's ``state_dict``, with or without low-rank terms.

    Raises:
        UserError: a low-rank term is incomplete or does not fit its layer.

    Example:
        >>> layer = {"fc.weight": torch.zeros(2, 3), "fc.lora_a": torch.ones(1, 4, 3), "fc.lora_b": torch.ones(1, 2, 4)}
        >>> fold_lora(layer)
        {'fc.weight': tensor([[4., 4., 4.],
                [4., 4., 4.]])}
    """
    folded = dict(tensors)
    for layer in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        a, b = (folded.pop(f"{layer}.{part}", None) for part in ("lora_a", "lora_b"))
        weight = folded.get(f"{layer}.weight")
        if a is None or b is None or weight is None or not _fit(weight, a, b):
            raise UserError(
                f"the low-rank terms of {layer} are damaged: expected lora_a and lora_b that fit its weight"
            )
        folded[f"{layer}.weight"] = _sum(weight, a, b)
    return folded


def _fit(weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether types and shapes are those of a layer and its terms: A [P, r, in], B [P, out, r], W [P·out, in]."""
    if not (weight.is_floating_point() and weight.dtype == a.dtype == b.dtype and a.ndim == b.ndim == 3):
        return False
    parts, rank, columns = a.shape
    return b.shape == (parts, b.shape[1], rank) and weight.shape == (parts * b.shape[1], columns)


def _sum(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``W + B·A``, with a pair (A, B) for each matrix stacked in W."""
    return weight + (b @ a).flatten(0, 1)


def _layers(network: nn.Module) -> dict[str, tuple[nn.Linear, int]]:
    """Return the encoder's layers to adapt by name, with the number of matrices stacked in each."""
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

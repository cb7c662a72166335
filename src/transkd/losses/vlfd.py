"""Visual-Linguistic Feature Distillation of C2VKD."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.files import read_tensor_file, tensors_in
from transkd.layers.upsampling import upsampled
from transkd.losses.shared.checks import check_choice, check_share, check_stage, paired_channels, stage_pairs
from transkd.losses.shared.distances import widen
from transkd.losses.shared.grids import on_grid
from transkd.losses.shared.pieces import full_precision, positions_of
from transkd.losses.shared.relations import relation_error, unit
from transkd.outputs import SegmentationOutput

__all__ = ["AttentionPool", "VLFDLoss", "graph_error", "load_attention_pool", "mean_kl"]

logger = logging.getLogger("transkd.losses")

GRIDS = ("teacher", "student")
SCOPES = ("batch", "image")
STUDENT_BRANCHES = ("pool", "mean_proj")
POOL_PARTS = ("positional_embedding", *(f"{name}_proj.{part}" for name in "qkvc" for part in ("weight", "bias")))


class VLFDLoss(nn.Module):
    """Compare the features of a stage by position, by relations, and after a vision-language attention pool.

    With F' = conv1x1(F) the student's features (F itself if it has the teacher's channels), F^t the teacher's, and N
    positions:

        global    1/(B·N·C) · Σ KL(softmax_C(F^t) ‖ softmax_C(F'))
        graph     mean of (G' − G^t)²,  G[i, j] = v_i·v_j / (C − 1),  v = u − mean_C(u),  u = F_i / ‖F_i‖
        language  1/(B·E) · Σ KL(softmax_E(pool(F^t)) ‖ softmax_E(pool(F')))
        loss      0.1 · global + 0.1 · graph + 0.5 · language

    The pool is the attention pool of a vision-language network such as CLIP's ResNets: one attention layer with the
    mean over positions as its only query, output size E. It is frozen (its weights are buffers); gradients pass through
    it to the student. The authors published neither module nor weights, so the weights must be given (`language`).
    Without them the language part is disabled: **this is not the complete VLFD**, and a warning is logged once.

    Choices where the paper is ambiguous:

    * Direction of the global KL: the code uses KL(teacher ‖ student), a secondary description of the paper the
      reverse; this follows the code.
    * Teacher's map: the code uses the output of a CNN's context module; networks here return stages, so a stage feature
      is used.
    * Student side of the language part: the training script applies the pool to the projected map ("pool", the
      default); a model file projects the mean over positions to E by a separate 1×1 convolution ("mean_proj").
    * Grid: the code uses 32×32 for crops of 512, with align_corners both True and False; here it is the teacher's grid,
      or another by `grid`, with align_corners=False.
    * Zero features: the code divides by the norm, which gives NaN; here such a position has relations of 0.

    The (B·N)² relations of a batch are compared exactly without storing the matrix. In distributed training each
    process relates only its own images, so with `scope` "batch" the graph part differs from that of one process with
    the joined batch.

    Source: Zheng et al., arXiv 2310.07265; the equations are those of its published training script.

    Args:
        student_channels: channels of every student stage, shallowest first.
        teacher_channels: channels of every teacher stage.
        stage: the stage to compare, counted from 1.
        global_weight: weight of the global part, by default as in the code; a weight of 0 disables the part.
        graph_weight: weight of the graph part.
        language_weight: weight of the language part.
        scope: relations between all positions of the "batch", as in the code, or of each "image".
        grid: size at which to compare: that of the "teacher", the "student", or (height, width) such as (32, 32).
        language: file with the weights of the pool: a vision-language network or its pool alone, in CLIP's naming
            (``….positional_embedding``, ``….q_proj.weight`` and so on); None disables the language part. The pool must
            have the teacher's channels at that stage (2048 for CLIP's RN50 and RN101).
        pool_heads: heads of the pool's attention; channels / 64 in CLIP.
        student_branch: "pool" or "mean_proj", see above.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. `target` is not used.

    Raises:
        UserError: a choice is unknown, the stage does not exist, a weight is negative or all are 0, the teacher has one
            channel, pool weights are missing or have another width, or the networks have other stages or channels than
            given.

    Example:
        >>> def output(width):
        ...     return SegmentationOutput(None, (torch.rand(2, width, 4, 6),), (), torch.rand(2, 3, 16, 24))
        >>> term = VLFDLoss(student_channels=(8,), teacher_channels=(12,), stage=1)
        >>> term(output(8), output(12)).shape
        torch.Size([])
    """

    needs = frozenset({"features"})

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        stage: int = 4,
        global_weight: float = 0.1,
        graph_weight: float = 0.1,
        language_weight: float = 0.5,
        scope: str = "batch",
        grid: str | Sequence[int] = "teacher",
        language: str | Path | None = None,
        pool_heads: int = 32,
        student_branch: str = "pool",
    ) -> None:
        super().__init__()
        self.student_channels, self.teacher_channels = paired_channels(self, student_channels, teacher_channels)
        check_stage(self, stage, len(self.student_channels))
        check_choice(self, "scope", scope, SCOPES)
        check_choice(self, "student_branch", student_branch, STUDENT_BRANCHES)
        self.stage, self.scope, self.grid, self.student_branch = stage, scope, _grid(self, grid), student_branch
        weights = {"global": global_weight, "graph": graph_weight, "language": language_weight}
        self.weights = _enabled_parts(self, weights, has_pool=language is not None)
        width, teacher_width = self.student_channels[stage - 1], self.teacher_channels[stage - 1]
        if teacher_width == 1 and "graph" in self.weights:
            raise UserError(
                "VLFDLoss: the graph divides by channels − 1, and the teacher has one channel: set graph_weight=0."
            )

        reads_map = self.weights.keys() & {"global", "graph"} or student_branch == "pool"
        projects = reads_map and width != teacher_width
        self.visual_proj = nn.Conv2d(width, teacher_width, 1, bias=False) if projects else None
        self.lang_proj: nn.Conv2d | None = None
        self.pool: AttentionPool | None = None
        if "language" in self.weights and language is not None:
            self.pool = load_attention_pool(language, pool_heads, teacher_width)
            if student_branch == "mean_proj":
                self.lang_proj = nn.Conv2d(width, self.pool.width, 1, bias=False)

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the features."""
        feature, teacher_feature = stage_pairs(self, "features", student, teacher)[self.stage - 1]
        with full_precision(feature):
            parts = self.compare(widen(feature), widen(teacher_feature))
            return torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()

    def compare(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return the unweighted enabled parts for maps [B, C_s, h, w] and [B, C_t, h', w']."""
        maps, teacher_maps = self._on_grid(_projected(student, self.visual_proj), teacher)
        parts = {}
        if "global" in self.weights:
            parts["global"] = mean_kl(maps, teacher_maps)
        if "graph" in self.weights:
            parts["graph"] = graph_error(maps, teacher_maps, self.scope)
        if self.pool is not None:
            mean = _projected(student.mean((2, 3), keepdim=True), self.lang_proj)
            pooled = self.pool(maps) if self.student_branch == "pool" else mean.flatten(1)
            parts["language"] = mean_kl(pooled, self.pool(teacher_maps))
        return parts

    def _on_grid(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.grid, str):
            return on_grid(self, student, teacher, self.grid)
        like = student.new_empty(len(teacher), 1, *self.grid)
        return on_grid(self, student, like)[0], on_grid(self, teacher, like)[0].detach()


def mean_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(softmax(teacher) ‖ softmax(student))`` over dimension 1, mean over all elements including dimension 1.

    Args:
        student: [B, C, …], float32 or float64.
        teacher: the same shape; detached.

    Example:
        >>> mean_kl(torch.tensor([[0.0, 1000.0]]), torch.zeros(1, 2))  # (500 - log 2) / 2
        tensor(249.6534)
    """
    log_q, log_p = student.log_softmax(1), teacher.detach().log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).mean()


def graph_error(student: Tensor, teacher: Tensor, scope: str = "batch") -> Tensor:
    """Mean squared difference between the relations of positions: the graph part of `VLFDLoss`.

    Args:
        student: [B, C, h, w], float32 or float64.
        teacher: the same shape; detached.
        scope: pairs within the "batch" or within each "image".

    Example:
        >>> graph_error(torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))  # equal channels: all relations are 0
        tensor(0.)
    """
    rows = [_centred(maps) for maps in (student, teacher.detach())]
    if scope == "batch":
        rows = [row.flatten(0, 1)[None] for row in rows]
    return relation_error(*rows) / (student.shape[1] - 1) ** 2


def _projected(maps: Tensor, layer: nn.Conv2d | None) -> Tensor:
    """Apply the 1×1 convolution, if any, in the dtype of the maps."""
    return maps if layer is None else F.conv2d(maps, layer.weight.to(maps.dtype))


def _centred(maps: Tensor) -> Tensor:
    """Rows u − mean_C(u) with u [B, N, C] the features divided by their norm."""
    rows = unit(positions_of(maps))
    return rows - rows.mean(-1, keepdim=True)


class AttentionPool(nn.Module):
    """Frozen attention pool of CLIP's ResNets (Radford et al., arXiv 2103.00020): all weights are buffers.

    The mean over positions is prepended as a token and a position embedding is added; its spatial part is resized
    bilinearly. The output is the projected result of an attention with the first token as its only query.

    Args:
        weights: ``positional_embedding`` [1 + g², C], and ``weight`` and ``bias`` of ``q_proj``, ``k_proj``, ``v_proj``
            [C, C] and ``c_proj`` [E, C].
        heads: attention heads.

    Attributes:
        channels: C.
        width: E.

    Shapes:
        [B, C, h, w] -> [B, E].
    """

    positional_embedding: Tensor

    def __init__(self, weights: dict[str, Tensor], heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.width, self.channels = weights["c_proj.weight"].shape
        for name in POOL_PARTS:
            self.register_buffer(name.replace(".", "_"), widen(weights[name].detach().clone()))

    def forward(self, maps: Tensor) -> Tensor:
        """Pool maps [B, C, h, w] to one vector per image."""
        tokens = positions_of(maps)
        tokens = torch.cat((tokens.mean(1, keepdim=True), tokens), 1) + self._positions(maps)
        query, key, value = (
            self._project(name, rows).view(*rows.shape[:2], self.heads, -1).transpose(1, 2)
            for name, rows in (("q", tokens[:, :1]), ("k", tokens), ("v", tokens))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self._project("c", attended.transpose(1, 2).flatten(1))

    def _project(self, name: str, rows: Tensor) -> Tensor:
        weight, bias = (self.get_buffer(f"{name}_proj_{part}").to(rows.dtype) for part in ("weight", "bias"))
        return F.linear(rows, weight, bias)

    def _positions(self, maps: Tensor) -> Tensor:
        """Resize the position embedding to the map's size: [1 + N, C]."""
        embedding = self.positional_embedding.to(maps.dtype)
        side = round((len(embedding) - 1) ** 0.5)
        square = embedding[1:].T.reshape(1, -1, side, side)
        resized = upsampled(square, maps.shape[-2:])
        return torch.cat((embedding[:1], resized[0].flatten(1).T))


def load_attention_pool(path: str | Path, heads: int, channels: int) -> AttentionPool:
    """Read the attention pool from a file of weights, with any prefix of its names.

    Args:
        path: a safetensors file or a PyTorch checkpoint.
        heads: attention heads.
        channels: channels of the maps to pool.

    Raises:
        UserError: the file does not exist, does not contain exactly one pool, or the pool has another width or its
            width is not divisible by the heads.
    """
    tensors = tensors_in(read_tensor_file(path)[0], path)
    first, *others = POOL_PARTS
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first) and tensors[name].ndim == 2]
    pools = [prefix for prefix in prefixes if all(prefix + name in tensors for name in others)]
    if len(pools) != 1:
        raise UserError(
            f"VLFDLoss: {path} must hold one attention pool (….positional_embedding and ….{{q,k,v,c}}_proj.{{weight,"
            f"bias}}, as CLIP's ResNets have); found {len(pools)}. Give language=PATH of such a file."
        )
    weights = {name: tensors[pools[0] + name] for name in POOL_PARTS}
    _check_pool(path, weights, heads, channels)
    return AttentionPool(weights, heads)


def _check_pool(path: str | Path, weights: dict[str, Tensor], heads: int, channels: int) -> None:
    positions, width = weights["positional_embedding"].shape
    if width != channels:
        raise UserError(
            f"VLFDLoss: the attention pool of {path} reads {width} channels, the teacher's stage has {channels}. "
            "Give a pool of that width, or choose a stage or teacher with the pool's width, such as "
            "deeplabv3plus_resnet101 for 2048."
        )
    if heads < 1 or width % heads:
        raise UserError(f"VLFDLoss: pool_heads must divide the pool's {width} channels; got {heads}.")
    if round((positions - 1) ** 0.5) ** 2 != positions - 1 or positions < 2:
        raise UserError(
            f"VLFDLoss: the position embedding of the pool of {path} must have 1 + g² rows, for a square grid; "
            f"it has {positions} rows. Give the pool of a network for square images."
        )


def _enabled_parts(term: VLFDLoss, weights: dict[str, float], *, has_pool: bool) -> dict[str, float]:
    """Return the weights of the parts to compute."""
    for name, weight in weights.items():
        check_share(term, f"{name}_weight", weight)
    if weights["language"] and not has_pool:
        logger.warning(
            "VLFDLoss has no weights of an attention pool (language=PATH), so the language part is disabled: "
            "this is not the complete VLFD of C2VKD."
        )
    enabled = {name: weight for name, weight in weights.items() if weight and (name != "language" or has_pool)}
    if not enabled:
        raise UserError(
            "VLFDLoss has no part to compute: give global_weight or graph_weight a value above 0, or language_weight "
            "one and language=PATH."
        )
    return enabled


def _grid(term: VLFDLoss, grid: str | Sequence[int]) -> str | tuple[int, ...]:
    if isinstance(grid, str):
        check_choice(term, "grid", grid, GRIDS)
        return grid
    if len(grid) != 2 or min(grid) < 1:
        raise UserError(
            f"VLFDLoss: grid must be {' or '.join(map(repr, GRIDS))}, or a height and a width from 1 on; "
            f"got {list(grid)}."
        )
    return tuple(grid)

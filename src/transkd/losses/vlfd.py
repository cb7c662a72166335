"""Visual-linguistic feature distillation of C2VKD."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.files import read_tensor_file, tensors_in
from transkd.layers.upsampling import upsampled
from transkd.losses.shared.checks import check_choice, paired_channels, stage_pairs
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
    """Compare one stage's features position by position, by their relations, and as a vision-language model sees them.

    On maps F' = conv1x1(F) of the student (F itself where it has the teacher's channels) and F^t, N positions:

        global    1/(B·N·C) · Σ KL(softmax_C(F^t) ‖ softmax_C(F'))
        graph     mean of (G' − G^t)²,  G[i, j] = v_i·v_j / (C − 1),  v = u − mean_C(u),  u = F_i / ‖F_i‖
        language  1/(B·E) · Σ KL(softmax_E(pool(F^t)) ‖ softmax_E(pool(F')))
        loss      0.1 · global + 0.1 · graph + 0.5 · language

    The pool is that of a vision-language network, such as CLIP's ResNets have: one attention whose only query is the
    mean of all positions, to a vector of E numbers. It stays as it is: its weights are buffers, the gradient passes
    through it to the student. The authors published neither the module nor its weights, so they must be given
    (`language`). Without them there is no language part: **that is not the whole VLFD**, and a warning says so once.

    What the publication leaves open, and what is done here:

    * The direction of the global KL. Its code has KL(teacher ‖ student), a reader of the paper reports the other
      one; the code is followed.
    * Which map of the teacher. The code takes the output of a CNN's context module; networks show their stages here,
      so it is a stage's features.
    * The student's side of the language part. The training script puts the projected map through the pool ("pool",
      the default), a model file brings the mean over positions to E by a 1×1 convolution of its own ("mean_proj").
    * The grid. The code's is 32×32 for crops of 512, with both values of align_corners; here it is the teacher's, or
      any other by `grid`, and align_corners=False.
    * Zero features. The code divides by a bare norm, which gives NaN; here such a position relates to none.

    All relations of a batch are (B·N)² numbers; they are computed exactly without that matrix. Each of several
    processes relates the positions of its own images alone, so with `scope` "batch" the graph part is not that of the
    joined batch.

    Source: Zheng et al., arXiv 2310.07265; the equations are those of its published training script.

    Args:
        student_channels: channels of each of the student's stages, shallowest first; all of them.
        teacher_channels: channels of each of the teacher's stages; all of them.
        stage: the stage to compare, counted from 1.
        global_weight: of the global part; 0 leaves a part out. This and the next two are the code's.
        graph_weight: of the graph part.
        language_weight: of the language part.
        scope: relations between all positions of the "batch", as in the code, or of each "image".
        grid: where to compare: "teacher" (the teacher's size), "student", or height and width, such as (32, 32).
        language: weights of the pool: a file that holds a vision-language network or its pool alone, in CLIP's naming
            (``….positional_embedding``, ``….q_proj.weight`` and so on); None leaves the language part out. The pool's
            channels must be the teacher's at that stage (2048 for CLIP's RN50 and RN101).
        pool_heads: heads of the pool's attention; the channels over 64 in CLIP.
        student_branch: "pool" or "mean_proj", see above.

    Shapes:
        Stage features [B, C_i, H_i, W_i], floating, to a scalar, float32 or float64. `target` is not read.

    Raises:
        UserError: an unknown choice, a stage that does not exist, weights that are negative or all 0, a teacher of one
            channel, pool weights that are missing or of another width; networks with stages or channels other than
            those given.

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
        if not 1 <= stage <= len(self.student_channels):
            raise UserError(f"VLFDLoss: stage must be from 1 to {len(self.student_channels)}; got {stage}.")
        check_choice(self, "scope", scope, SCOPES)
        check_choice(self, "student_branch", student_branch, STUDENT_BRANCHES)
        self.stage, self.scope, self.grid, self.student_branch = stage, scope, _grid(self, grid), student_branch
        weights = {"global": global_weight, "graph": graph_weight, "language": language_weight}
        self.weights = _used(weights, has_pool=language is not None)
        width, wanted = self.student_channels[stage - 1], self.teacher_channels[stage - 1]
        if wanted == 1 and "graph" in self.weights:
            raise UserError("VLFDLoss: the graph divides by channels less 1, and the teacher has one: graph_weight=0.")

        reads_map = self.weights.keys() & {"global", "graph"} or student_branch == "pool"
        self.visual_proj = nn.Conv2d(width, wanted, 1, bias=False) if reads_map and width != wanted else None
        self.lang_proj: nn.Conv2d | None = None
        self.pool: AttentionPool | None = None
        if "language" in self.weights and language is not None:
            self.pool = load_attention_pool(language, pool_heads, wanted)
            if student_branch == "mean_proj":
                self.lang_proj = nn.Conv2d(width, self.pool.width, 1, bias=False)

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compare the features."""
        feature, other = stage_pairs(self, "features", student, teacher)[self.stage - 1]
        with full_precision(feature):
            parts = self.compare(widen(feature), widen(other))
            return torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()

    def compare(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Give the parts that have a weight, before it, for maps [B, C_s, h, w] and [B, C_t, h', w']."""
        ours, theirs = self._on_grid(_projected(student, self.visual_proj), teacher)
        parts = {}
        if "global" in self.weights:
            parts["global"] = mean_kl(ours, theirs)
        if "graph" in self.weights:
            parts["graph"] = graph_error(ours, theirs, self.scope)
        if self.pool is not None:
            mean = _projected(student.mean((2, 3), keepdim=True), self.lang_proj)
            pooled = self.pool(ours) if self.student_branch == "pool" else mean.flatten(1)
            parts["language"] = mean_kl(pooled, self.pool(theirs))
        return parts

    def _on_grid(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.grid, str):
            return on_grid(self, student, teacher, self.grid)
        like = student.new_empty(len(teacher), 1, *self.grid)
        return on_grid(self, student, like)[0], on_grid(self, teacher, like)[0].detach()


def mean_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(softmax(teacher) ‖ softmax(student))`` over dimension 1, as a mean over all elements, that dimension's too.

    Args:
        student: [B, C, …], float32 or float64.
        teacher: the same shape; a constant.

    Example:
        >>> mean_kl(torch.tensor([[0.0, 1000.0]]), torch.zeros(1, 2))  # (500 - log 2) / 2
        tensor(249.6534)
    """
    logs = student.log_softmax(1), teacher.detach().log_softmax(1)
    return F.kl_div(*logs, reduction="none", log_target=True).mean()


def graph_error(student: Tensor, teacher: Tensor, scope: str = "batch") -> Tensor:
    """Mean squared difference between the relations of positions, the graph part of `VLFDLoss`.

    Args:
        student: [B, C, h, w], float32 or float64.
        teacher: the same shape; a constant.
        scope: pairs within the "batch" or within each "image".

    Example:
        >>> graph_error(torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))  # a position of equal channels relates to none
        tensor(0.)
    """
    rows = [_centred(maps) for maps in (student, teacher.detach())]
    if scope == "batch":
        rows = [row.flatten(0, 1)[None] for row in rows]
    return relation_error(*rows) / (student.shape[1] - 1) ** 2


def _projected(maps: Tensor, layer: nn.Conv2d | None) -> Tensor:
    """Apply a 1×1 convolution, where there is one, in the type of the maps."""
    return maps if layer is None else F.conv2d(maps, layer.weight.to(maps.dtype))


def _centred(maps: Tensor) -> Tensor:
    """Rows [B, N, C] of length 1, from each of which the mean of its channels is then taken."""
    rows = unit(positions_of(maps))
    return rows - rows.mean(-1, keepdim=True)


class AttentionPool(nn.Module):
    """The pool that ends the visual part of CLIP's ResNets, not trained: all weights are buffers.

    The mean over positions is put before them; to all, a position embedding is added, whose spatial part is resized
    bilinearly. An attention with that first token as its only query gives, projected, the result.

    Args:
        weights: ``positional_embedding`` [1 + g², C], and ``weight`` and ``bias`` of ``q_proj``, ``k_proj``, ``v_proj``
            [C, C] and ``c_proj`` [E, C].
        heads: of the attention.

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
        """Give one vector per image."""
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
        """The position embedding [1 + N, C] for a map's size."""
        embedding = self.positional_embedding.to(maps.dtype)
        side = round((len(embedding) - 1) ** 0.5)
        square = embedding[1:].T.reshape(1, -1, side, side)
        resized = upsampled(square, maps.shape[-2:])
        return torch.cat((embedding[:1], resized[0].flatten(1).T))


def load_attention_pool(path: str | Path, heads: int, channels: int) -> AttentionPool:
    """Read the attention pool from a file of weights that holds one, whatever stands before its names.

    Args:
        path: a safetensors file or a PyTorch checkpoint.
        heads: of the attention.
        channels: the width of the maps that it is to pool.

    Raises:
        UserError: there is no such file, not one pool in it, or a pool of another width or other heads.
    """
    tensors = tensors_in(read_tensor_file(path)[0], path)
    first, *others = POOL_PARTS
    starts = [name.removesuffix(first) for name in tensors if name.endswith(first) and tensors[name].ndim == 2]
    pools = [start for start in starts if all(start + name in tensors for name in others)]
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
            "Give one for that width, or choose a stage or a teacher of the pool's, such as deeplabv3plus_resnet101 "
            "for 2048."
        )
    if heads < 1 or width % heads:
        raise UserError(f"VLFDLoss: pool_heads must divide the pool's {width} channels; got {heads}.")
    if round((positions - 1) ** 0.5) ** 2 != positions - 1 or positions < 2:
        raise UserError(
            f"VLFDLoss: the position embedding of the pool of {path} must be of a square grid and one token more; "
            f"it has {positions} rows. Give the pool of a network for square images."
        )


def _used(weights: dict[str, float], *, has_pool: bool) -> dict[str, float]:
    """The parts that are computed, with their weights."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise UserError(f"VLFDLoss: {name}_weight must be a number from 0 on; got {weight}.")
    if weights["language"] and not has_pool:
        logger.warning(
            "VLFDLoss has no weights of an attention pool (language=PATH), so it leaves the language part out and "
            "compares features alone: this is not the whole VLFD of C2VKD."
        )
    used = {name: weight for name, weight in weights.items() if weight and (name != "language" or has_pool)}
    if not used:
        raise UserError(
            "VLFDLoss has no part to compute: give global_weight or graph_weight a value above 0, or language_weight "
            "one and language=PATH."
        )
    return used


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

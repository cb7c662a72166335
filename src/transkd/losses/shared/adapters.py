"""1×1 layers that bring a student's feature maps to the teacher's width."""

from collections.abc import Sequence

from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.checks import check_choice

__all__ = ["adapt", "stage_adapters"]

ADAPTERS = ("conv", "conv_bn_relu", None)


def stage_adapters(
    term: object,
    adapter: str | None,
    stages: Sequence[int],
    student_channels: Sequence[int],
    teacher_channels: Sequence[int],
    *,
    equal_too: bool = False,
) -> nn.ModuleDict:
    """Build one adapter for each chosen stage that needs one, under the stage's number.

    Args:
        term: the one that asks; its name goes into messages.
        adapter: "conv" is a 1×1 convolution without bias, "conv_bn_relu" has batch normalisation and ReLU behind it,
            None builds nothing.
        stages: the chosen stages, counted from 1.
        student_channels: of all the student's stages.
        teacher_channels: of all the teacher's stages.
        equal_too: also for stages whose channels are equal already; without it nothing idle is built.

    Raises:
        UserError: an unknown adapter, a stage that does not exist, or channels that differ without an adapter.

    Example:
        >>> stage_adapters(None, "conv", (1, 2), (8, 16), (8, 24))
        ModuleDict(
          (2): Conv2d(16, 24, kernel_size=(1, 1), stride=(1, 1), bias=False)
        )
    """
    check_choice(term, "adapter", adapter, ADAPTERS)
    name, count = type(term).__name__, len(student_channels)
    adapters = nn.ModuleDict()
    for stage in stages:
        if stage > count:
            raise UserError(f"{name}: the networks have {count} stages; got stages={list(stages)}.")
        ours, theirs = student_channels[stage - 1], teacher_channels[stage - 1]
        if adapter is None and ours != theirs:
            raise UserError(
                f"{name} without an adapter compares channel by channel; at stage {stage} the student has {ours} "
                f"channels, the teacher {theirs}. Set adapter to 'conv'."
            )
        if adapter is not None and (equal_too or ours != theirs):
            convolution = nn.Conv2d(ours, theirs, 1, bias=False)
            bare = adapter == "conv"
            adapters[str(stage)] = (
                convolution if bare else nn.Sequential(convolution, nn.BatchNorm2d(theirs), nn.ReLU())
            )
    return adapters


def adapt(term: object, adapters: nn.ModuleDict, stage: int, maps: Tensor) -> Tensor:
    """Bring a stage's maps [B, C_s, h, w] to [B, C_t, h, w]; a stage without an adapter stays as it is.

    Raises:
        UserError: in training, batch normalisation of a single value per channel.
    """
    if str(stage) not in adapters:
        return maps
    adapter = adapters[str(stage)]
    if adapter.training and isinstance(adapter, nn.Sequential) and maps[:, 0].numel() == 1:
        raise UserError(
            f"{type(term).__name__} cannot normalise a batch of one whose map is 1 x 1: it has one value per channel. "
            "Use larger images or a larger batch, or set adapter to 'conv'."
        )
    adapted: Tensor = adapter(maps)
    return adapted

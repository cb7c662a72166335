"""1×1 convolutions that project a student's feature maps to the teacher's number of channels."""

from collections.abc import Sequence

from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses.shared.checks import check_choice, check_stages, name_of

__all__ = ["adapt", "as_weights", "stage_adapters"]

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
    """Build an adapter for each selected stage that needs one; keys are the stage numbers.

    Args:
        term: the calling term; its class name appears in error messages.
        adapter: "conv" is a 1×1 convolution without bias, "conv_bn_relu" adds batch normalisation and ReLU, None builds
            no adapter.
        stages: the selected stages, counted from 1.
        student_channels: channels of every student stage.
        teacher_channels: channels of every teacher stage.
        equal_too: build an adapter also for stages whose channels are already equal.

    Raises:
        UserError: the adapter is unknown, a stage does not exist, or channels differ and adapter is None.

    Example:
        >>> stage_adapters(None, "conv", (1, 2), (8, 16), (8, 24))
        ModuleDict(
          (2): Conv2d(16, 24, kernel_size=(1, 1), stride=(1, 1), bias=False)
        )
    """
    check_choice(term, "adapter", adapter, ADAPTERS)
    adapters = nn.ModuleDict()
    for stage in check_stages(term, stages, len(student_channels)):
        student_width, teacher_width = student_channels[stage - 1], teacher_channels[stage - 1]
        if adapter is None and student_width != teacher_width:
            raise UserError(
                f"{name_of(term)} without an adapter compares channel by channel; at stage {stage} the student has "
                f"{student_width} channels, the teacher {teacher_width}. Set adapter to 'conv'."
            )
        if adapter is not None and (equal_too or student_width != teacher_width):
            layer: nn.Module = nn.Conv2d(student_width, teacher_width, 1, bias=False)
            if adapter == "conv_bn_relu":
                layer = nn.Sequential(layer, nn.BatchNorm2d(teacher_width), nn.ReLU())
            adapters[str(stage)] = layer
    return adapters


def adapt(term: object, adapters: nn.ModuleDict, stage: int, maps: Tensor) -> Tensor:
    """Project a stage's maps [B, C_s, h, w] to [B, C_t, h, w]; return them unchanged where the stage has no adapter.

    Raises:
        UserError: batch normalisation in training mode would see a single value per channel.
    """
    if str(stage) not in adapters:
        return maps
    adapter = adapters[str(stage)]
    if adapter.training and isinstance(adapter, nn.Sequential) and maps[:, 0].numel() == 1:
        raise UserError(
            f"{name_of(term)} cannot normalise a batch of one whose map is 1 x 1: it has one value per channel. "
            "Use larger images or a larger batch, or set adapter to 'conv'."
        )
    adapted: Tensor = adapter(as_weights(adapter, maps))
    return adapted


def as_weights(module: nn.Module, maps: Tensor) -> Tensor:
    """Convert widened maps to the dtype of a module's weights, which is not theirs under ``precision=bf16-true``."""
    return maps.to(next((parameter.dtype for parameter in module.parameters()), maps.dtype))

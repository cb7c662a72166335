"""Any timm network with four stages as an encoder."""

import re
from typing import Any

import timm
import torch
from timm.layers.format import Format
from torch import Tensor, nn

from transkd.errors import UserError

__all__ = ["TimmEncoder"]

STAGES = 4


class TimmEncoder(nn.Module):
    """Four stages of a timm network, through timm's ``features_only``, with its patch embeddings where it has them.

    Patch embeddings are what the layers that turn a map into tokens give, before the first block of a stage: one
    ``patch_embed`` for the image and a ``downsample`` before each later stage (PVTv2, Swin, TinyViT), or a list
    ``patch_embeds`` (Twins). A network without them (ResNet, ConvNeXt, EfficientViT) shows none.

    Args:
        name: a network that ``timm.list_models`` lists.
        args: handed to ``timm.create_model`` (``output_stride``, ``drop_path_rate``, ``img_size``, …).

    Attributes:
        architecture: the name.
        channels: width of each stage.
        strides: pixels of the image to one of the stage, per stage.

    Shapes:
        image [B, 3, H, W] -> four features [B, C_i, H_i, W_i] and four patch embeddings [B, H_i·W_i, C_i], or none.

    Raises:
        UserError: timm has no such network, it does not take an argument, or it has no four stages from stride 4 on.

    Example:
        >>> import torch
        >>> encoder = TimmEncoder("pvt_v2_b0")
        >>> features, embeddings = encoder.forward_stages(torch.zeros(1, 3, 64, 96))
        >>> encoder.strides, tuple(features[3].shape), tuple(embeddings[3].shape)
        ((4, 8, 16, 32), (1, 256, 2, 3), (1, 6, 256))
    """

    def __init__(self, name: str, **args: Any) -> None:
        super().__init__()
        self.architecture = name
        self.body, self.strides = _create(name, args)
        self.channels = tuple(self.body.feature_info.channels())
        self._channels_last = getattr(self.body, "output_fmt", Format.NCHW) == Format.NHWC
        taps = _patch_embeddings(self.body)
        self._recorder = _Recorder(len(taps))
        for i, tap in enumerate(taps):
            tap.register_forward_hook(_Tap(self._recorder, i))

    def forward_stages(self, image: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Features and patch embeddings of the four stages."""
        features = self.body(image)
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return tuple(features), self._recorder.take(features)


class _Recorder:
    """Holds what the taps saw in the forward that runs."""

    def __init__(self, count: int) -> None:
        self.seen: list[Tensor | None] = [None] * count

    def take(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """The patch embeddings as tokens [B, N, C]; nothing is kept."""
        tokens = []
        for i, feature in enumerate(features[: len(self.seen)]):
            seen, self.seen[i] = self.seen[i], None
            assert seen is not None
            if seen.ndim == 4:
                # which axis holds the channels is told by the grid, which is that of the stage's feature
                seen = seen.flatten(2).transpose(1, 2) if seen.shape[2:] == feature.shape[2:] else seen.flatten(1, 2)
            tokens.append(seen)
        return tuple(tokens)


class _Tap:
    """A forward hook that a copy of the network copies too."""

    def __init__(self, recorder: _Recorder, stage: int) -> None:
        self.recorder, self.stage = recorder, stage

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.recorder.seen[self.stage] = output[0] if isinstance(output, tuple) else output


def _create(name: str, args: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
    if name.startswith(("swin_", "swinv2_")):  # any size of image, not just that of the pretraining
        args = {"strict_img_size": False, **args}
    try:
        with torch.device("meta"):  # a look at the stages costs nothing, and draws no random number
            probe: Any = timm.create_model(name, features_only=True, **args)
        found = probe.feature_info.reduction()
        strides = tuple(found[-STAGES:])
        if len(strides) < STAGES or strides[0] != 4:
            raise UserError(
                f"{name} has stages at strides {found}; expected {STAGES} of them, the first at stride 4. Choose a "
                "hierarchical network (pvt_v2_b2, swin_tiny_patch4_window7_224, convnext_tiny, resnet50), or name "
                "the taps of this one with transkd.models.Tapped"
            )
        indices = tuple(range(len(found) - STAGES, len(found)))
        body = timm.create_model(name, features_only=True, out_indices=indices, **args)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"timm cannot build {name} with {args} as four stages: {error}") from error
    return body, strides


def _patch_embeddings(body: nn.Module) -> list[nn.Module]:
    """The four layers that make patch embeddings, shallowest first; empty where the network is not of that kind."""
    modules = {name.removeprefix("model."): module for name, module in body.named_modules()}
    listed = [modules[f"patch_embeds.{i}"] for i in range(STAGES) if f"patch_embeds.{i}" in modules]
    downsamples = [
        module
        for name, module in modules.items()
        if re.fullmatch(r"(stages|layers)[._]\d\.downsample", name) and not isinstance(module, nn.Identity)
    ]
    chain = [modules["patch_embed"], *downsamples] if "patch_embed" in modules else []
    return next((taps for taps in (listed, chain) if len(taps) == STAGES), [])

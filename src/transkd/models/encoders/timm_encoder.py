"""Encoder from any timm network with four stages."""

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
    """Four stages of a timm network (``features_only=True``), with its patch embeddings if it has any.

    Patch embeddings are the outputs of the layers that convert a map to tokens before the first block of a stage: a
    ``patch_embed`` for the image and a ``downsample`` before each later stage (PVTv2, Swin, TinyViT), or a list
    ``patch_embeds`` (Twins). Other networks (ResNet, ConvNeXt, EfficientViT) have none.

    Args:
        name: a name in ``timm.list_models()``.
        args: arguments of ``timm.create_model`` (``output_stride``, ``drop_path_rate``, ``img_size``, …).

    Attributes:
        architecture: the timm name.
        channels: channels of each stage.
        strides: stride of each stage in image pixels.

    Shapes:
        image [B, 3, H, W] -> four features [B, C_i, H_i, W_i] and four patch embeddings [B, H_i·W_i, C_i], or none.

    Raises:
        UserError: timm has no such network, the network does not accept an argument, or does not have four stages from
            stride 4.

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
        """Return features and patch embeddings of the four stages."""
        self._recorder.open = True
        try:
            features = self.body(image)
        except BaseException:
            self._recorder.clear()
            raise
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return tuple(features), self._recorder.take(features)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable activation checkpointing, if timm implements it for the network."""
        self.body.set_grad_checkpointing(enable)


class _Recorder:
    """Outputs of the taps in the current forward."""

    def __init__(self, count: int) -> None:
        self.open = False  # False outside of a forward, when checkpointing recomputes a layer in the backward pass
        self.seen: list[Tensor | None] = [None] * count

    def take(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the patch embeddings as tokens [B, N, C] and clear the record."""
        taken = [seen for seen in self.seen if seen is not None]
        self.clear()
        # Exported programs return only logits; skip the shape checks below. Under torch.compile older torch (2.8, 2.9)
        # gives True for is_exporting() too.
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            return ()
        if not taken or taken[0].ndim == 3:
            return tuple(taken)
        # Find the channel axis by comparing all four stages with the features' grids: a single stage can be ambiguous
        # (PVTv2-B0 has 64 channels on a 64×64 grid for 512×512 images).
        channels_first = all(seen.shape[2:] == feature.shape[2:] for seen, feature in zip(taken, features, strict=True))
        return tuple(seen.flatten(2).transpose(1, 2) if channels_first else seen.flatten(1, 2) for seen in taken)

    def clear(self) -> None:
        """Clear the record."""
        self.seen = [None] * len(self.seen)
        self.open = False


class _Tap:
    """Forward hook as an object, so that copies of the network have their own."""

    def __init__(self, recorder: _Recorder, stage: int) -> None:
        self.recorder, self.stage = recorder, stage

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.recorder.open:
            self.recorder.seen[self.stage] = output[0] if isinstance(output, tuple) else output


def _create(name: str, args: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
    if args.get("pretrained"):
        raise UserError(f"pretrained=True: use weights=timm://{name} instead, which records their licence")
    swin = name.startswith(("swin_", "swinv2_"))
    if swin:  # accept images of any size, not only that of the pretraining
        args = {"strict_img_size": False, **args}
    try:
        with torch.device("meta"):  # meta: no memory, no random numbers
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
        body: Any = timm.create_model(name, features_only=True, out_indices=indices, **args)
        if swin:  # accept sizes that are not multiples of the patch size
            body.patch_embed.dynamic_img_pad = True
    except UserError:
        raise
    except Exception as error:  # networks raise many types of exceptions, also AssertionError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"timm cannot build {name} with {args} as four stages: {reason}") from error
    return body, strides


def _patch_embeddings(body: nn.Module) -> list[nn.Module]:
    """Return the four layers that compute patch embeddings, shallowest first; empty if there are none."""
    modules = {name.removeprefix("model."): module for name, module in body.named_modules()}
    listed = [modules[f"patch_embeds.{i}"] for i in range(STAGES) if f"patch_embeds.{i}" in modules]
    downsamples = [
        module
        for name, module in modules.items()
        if re.fullmatch(r"(stages|layers)[._]\d\.downsample", name) and not isinstance(module, nn.Identity)
    ]
    chain = [modules["patch_embed"], *downsamples] if "patch_embed" in modules else []
    return next((taps for taps in (listed, chain) if len(taps) == STAGES), [])

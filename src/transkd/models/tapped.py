"""Adapter that makes any module a teacher or student; forward hooks on named submodules capture its features."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transkd.errors import UserError
from transkd.models.network import Network
from transkd.models.tap_layout import TapLayout, alternatives, consistent_layouts, describe, first_tensor
from transkd.outputs import EVERYTHING, SegmentationOutput

__all__ = ["Tapped"]


class Tapped(Network):
    """Any module that takes images, with taps (forward hooks) on the submodules whose outputs the losses read.

    At construction a random image (the probe) determines channels and layout of each tap. Every forward checks that
    they have not changed and that each tap is called exactly once. The hooks are removed when the ``Tapped`` is
    deleted; copies and pickles have their own hooks. (Hugging Face's SegFormer cannot be pickled after a forward, with
    or without taps, so it cannot be sent to spawned processes.)

    The ``state_dict`` has the wrapped module's names, also inside a LightningModule, so a trained student loads into
    the plain module. The taps cause no graph breaks in ``torch.compile``. Within the module only non-reentrant
    activation checkpointing is supported: with reentrant checkpointing, a tap inside gets no gradient. Forwards must
    not overlap: use DistributedDataParallel, not DataParallel.

    Args:
        module: module with a normalised image [B, 3, H, W] as input; it is not copied.
        features: names of submodules as in ``module.named_modules()``, shallowest first. Each returns a map
            [B, C, H, W] or [B, H, W, C], tokens [B, N, C] without class token, or a tuple that starts with one of
            these. The size of maps and tokens must be the image's divided by a stride of 1, 2, 4, 8, 14, 16, 32 or 64,
            rounded up or down; for maps the same aspect ratio (within 10 %) is sufficient.
        embeddings: the same for the patch embeddings.
        logits: submodule that returns the logits; None uses the module's output: a tensor [B, K, h, w], or an object
            or mapping with one under "logits" or "out". With any other output the network has no logits.
        mean: subtracted from RGB in [0, 1]; by default ImageNet's.
        std: divides the difference; by default ImageNet's.
        probe: height and width of the image at construction; not square, so that layouts are distinguishable.

    Attributes:
        module: the wrapped module.
        channels: channels of each feature, or of each embedding if there are no features.
        num_classes: number of classes K; 0 if the module has no logits.

    Shapes:
        image [B, 3, H, W], uint8 or float in [0, 1] -> SegmentationOutput; features [B, C_i, H_i, W_i], embeddings
        [B, N_i, C_i], logits [B, K, h, w], or None if they are not in ``needs`` or there are none.

    Raises:
        UserError: a submodule does not exist, the module fails on the probe, a tap is not called exactly once, its
            output is modified in place later, or has none or more than one of the layouts.

    Example:
        >>> from torchvision.models.segmentation import fcn_resnet50
        >>> network = fcn_resnet50(weights=None, weights_backbone=None, num_classes=19)
        >>> teacher = Tapped(network, features=["backbone.layer1", "backbone.layer4"]).eval()
        >>> teacher.channels, teacher.num_classes
        ((256, 2048), 19)
        >>> output = teacher(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        >>> output.features[1].shape, output.logits.shape
        (torch.Size([1, 2048, 8, 8]), torch.Size([1, 19, 64, 64]))
    """

    def __init__(
        self,
        module: nn.Module,
        features: Sequence[str] = (),
        embeddings: Sequence[str] = (),
        logits: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        probe: tuple[int, int] = (64, 96),
    ) -> None:
        super().__init__((), 0, mean, std)
        self.name = type(module).__name__
        self.module = module
        self.register_load_state_dict_pre_hook(_add_module_to_keys)  # type: ignore[no-untyped-call]
        like = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), self.mean)
        self.mean, self.std = (tensor.to(like.device, like.dtype) for tensor in (self.mean, self.std))

        for kind, names in (("features", features), ("embeddings", embeddings)):
            if isinstance(names, str):
                raise UserError(f"{kind} is a list of names, got a single name; write {kind}=[{names!r}]")
        self.features, self.embeddings, self.logits = tuple(features), tuple(embeddings), logits
        self._taps = _Taps(module, [*features, *embeddings, *([] if logits is None else [logits])])
        try:
            self._layouts, self.num_classes = self._probe(probe)
        except BaseException:
            self._taps.remove()  # explicitly: the traceback keeps this object alive
            raise
        self.channels = tuple(self._layouts[name].channels for name in self.features or self.embeddings)

    def forward(self, image: Tensor, needs: Collection[str] = EVERYTHING) -> SegmentationOutput:
        """Run the module; logits are None unless they are in ``needs``."""
        image = self.normalise(image)
        output, tapped = self._run(image)
        return SegmentationOutput(
            self._find_logits(output, tapped, image) if "logits" in needs and self.num_classes else None,
            tuple(self._layouts[name].to_map(tapped[name], image) for name in self.features),
            tuple(self._layouts[name].to_tokens(tapped[name], image) for name in self.embeddings),
            image,
        )

    def _run(self, image: Tensor) -> tuple[Any, dict[str, Any]]:
        """Return the module's output and the output of each tap."""
        records = self._taps.open()
        try:
            output = self.module(image)
            for name, outputs in records.items():
                if len(outputs) != 1:
                    raise UserError(
                        f"tap {name!r} fired {len(outputs)} times in one forward of {self.name}, expected once; "
                        f"tap a submodule that runs once, such as {alternatives(name, self.module)}"
                    )
            return output, {name: outputs[0] for name, outputs in records.items()}
        finally:
            records.clear()

    def _find_logits(self, output: Any, tapped: dict[str, Any], image: Tensor) -> Tensor:
        if self.logits is not None:
            return self._layouts[self.logits].to_map(tapped[self.logits], image)
        logits = _logits_of(output)
        if logits is None or logits.shape[1] != self.num_classes:
            raise UserError(
                f"{self.name} returned {describe(output)}, expected logits [B, {self.num_classes}, h, w] as at "
                "construction; name the submodule that always returns them: logits=…"
            )
        return logits

    def _probe(self, size: tuple[int, int]) -> tuple[dict[str, TapLayout], int]:
        """Determine each tap's layout and the number of classes; restore modes and random state afterwards."""
        height, width = size
        image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0), device="cpu")
        image = self.normalise(image.to(self.mean))
        modes = {module: module.training for module in self.module.modules()}
        try:
            with torch.no_grad(), torch.random.fork_rng([image.device] if image.is_cuda else []):
                self.module.eval()
                with _unchanged(self.module, self._taps.names):
                    output, tapped = self._run(image)
        except UserError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.name} fails on the probe, an image of {height} x {width}: {reason}; "
                "give a size that it accepts: probe=(H, W)"
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
        layouts = {name: TapLayout.infer(name, tap, image, self.module) for name, tap in tapped.items()}
        if self.logits is not None:
            return layouts, layouts[self.logits].channels
        logits = _logits_of(output)
        return layouts, 0 if logits is None or "BCHW" not in consistent_layouts(logits, image) else logits.shape[1]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the wrapped module's ``state_dict``, without a prefix."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a ``state_dict`` of the wrapped module."""
        return self.module.load_state_dict(*args, **kwargs)


def _add_module_to_keys(tapped: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add "module." to the keys of a ``Tapped`` that is a submodule: PyTorch loads its child under that name."""
    own = [key for key in state_dict if key.startswith(prefix)]
    state_dict.update({f"{prefix}module.{key[len(prefix) :]}": state_dict.pop(key) for key in own})


class _Taps:
    """Forward hooks on a module and their records; the hooks are removed with this object."""

    handles: Sequence[RemovableHandle] = ()

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        modules = dict(module.named_modules(remove_duplicate=False))
        self.names = tuple(dict.fromkeys(names))
        for name in self.names:
            if name not in modules:
                raise UserError(
                    f"no submodule {name!r} to tap in {type(module).__name__}; there are {alternatives(name, module)} "
                    "(names are those of module.named_modules())"
                )
        self.records: dict[str, list[Any]] = {}
        self.handles = [modules[name].register_forward_hook(_Tap(name, self.records)) for name in self.names]

    def open(self) -> dict[str, list[Any]]:
        """Enable recording until the records are cleared."""
        self.records.update({name: [] for name in self.names})
        return self.records

    def remove(self) -> None:
        """Remove the hooks from the module."""
        for handle in self.handles:
            handle.remove()

    def __del__(self) -> None:
        self.remove()


class _Tap:
    """Forward hook that records its submodule's output; an object, so that deep copies have their own records."""

    def __init__(self, name: str, records: dict[str, list[Any]]) -> None:
        self.name, self.records = name, records

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.name in self.records:  # otherwise the module is run outside of Tapped.forward
            self.records[self.name].append(output)


@contextmanager
def _unchanged(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Check that the outputs of the taps are not modified in place within the context."""
    versions: dict[str, tuple[Tensor, int]] = {}

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None and not tensor.is_inference():  # inference tensors have no version counter
            versions[name] = tensor, tensor._version  # no public way to detect a write

    handles = [module.get_submodule(name).register_forward_hook(partial(record, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, (tensor, version) in versions.items():
        if tensor._version != version:
            raise UserError(
                f"the output of tap {name!r} is modified in place later in the forward, as by ReLU(inplace=True); "
                "tap the submodule that modifies it, or set its inplace to False"
            )


def _logits_of(output: Any) -> Tensor | None:
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits", output.get("out"))
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.ndim == 4 else None

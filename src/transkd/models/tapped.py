"""Any network as a teacher or a student: its submodules are named, what they give is shown to the losses."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transkd.errors import UserError
from transkd.models.network import Network
from transkd.outputs import EVERYTHING, SegmentationOutput

__all__ = ["Tapped"]

STRIDES = (1, 2, 4, 8, 14, 16, 32, 64)
LAYOUTS = {"BCHW": "a map [B, C, H, W]", "BHWC": "a map [B, H, W, C]", "BNC": "tokens [B, N, C]"}


class Tapped(Network):
    """Any module that takes images, with taps on those of its submodules that the losses read.

    One random image at construction tells how wide each tap is and how it lies in memory; every forward checks that
    this still holds and that each tap fires exactly once. The taps are forward hooks; they leave the module when the
    ``Tapped`` is deleted. Its copies and pickles have hooks of their own (Hugging Face's SegFormer does not pickle
    once it has run, with or without taps, so it cannot be sent to spawned processes).

    The ``state_dict`` is the wrapped module's own, name by name, also inside a LightningModule, so a trained student
    loads into the bare module. ``torch.compile`` meets no graph breaks in the taps. Gradient checkpointing within the
    module works where it is not reentrant; reentrant, a tap inside shows no gradient. One forward at a time:
    DistributedDataParallel, not DataParallel.

    Args:
        module: takes a normalised image [B, 3, H, W]; is not copied.
        features: names of submodules as ``module.named_modules()`` gives them, shallowest first. Each gives a map
            [B, C, H, W] or [B, H, W, C], or tokens [B, N, C] without class token, or a tuple that starts with one of
            these. Maps and tokens must fit the image over a stride of 1, 2, 4, 8, 14, 16, 32 or 64, rounded up or
            down; a map may also just have the image's shape.
        embeddings: the same for the patch embeddings.
        logits: the submodule that gives the logits; None takes the module's own output: a tensor [B, K, h, w], or an
            object or mapping that has it as "logits" or "out". Whatever else comes out counts as no logits.
        mean: subtracted from RGB in [0, 1]; ImageNet's where not given.
        std: divides what is left; ImageNet's where not given.
        probe: height and width of the image at construction; not square, so that no two layouts look alike.

    Attributes:
        module: the wrapped module.
        channels: width of each feature; of the embeddings where there are no features.
        num_classes: number of classes K; 0 where the module gives no logits.

    Shapes:
        image [B, 3, H, W], uint8 or float in [0, 1] -> SegmentationOutput; features [B, C_i, H_i, W_i], embeddings
        [B, N_i, C_i], logits [B, K, h, w], or None where ``needs`` does not name them or there are none.

    Raises:
        UserError: no such submodule; the module does not take the probe; a tap that does not fire, fires twice, is
            changed in place later on, or gives what is none of the layouts, or fits two of them.

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
        like = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), self.mean)
        self.mean, self.std = (tensor.to(like.device, like.dtype) for tensor in (self.mean, self.std))

        for kind, names in (("features", features), ("embeddings", embeddings)):
            if isinstance(names, str):
                raise UserError(f"{kind} is a list of names, got a single one; write {kind}=[{names!r}]")
        self.features, self.embeddings, self.logits = tuple(features), tuple(embeddings), logits
        self._taps = _Taps(module, [*features, *embeddings, *([] if logits is None else [logits])])
        try:
            self._layouts, self.num_classes = self._probe(probe)
        except BaseException:
            self._taps.remove()  # the traceback keeps this object alive
            raise
        self.channels = tuple(self._layouts[name].channels for name in self.features or self.embeddings)

    def forward(self, image: Tensor, needs: Collection[str] = EVERYTHING) -> SegmentationOutput:
        """Run the whole module; logits are shown where ``needs`` names them."""
        image = self.normalise(image)
        output, shown = self._run(image)
        return SegmentationOutput(
            self._shown_logits(output, shown, image) if "logits" in needs and self.num_classes else None,
            tuple(self._layouts[name].to_map(shown[name], image) for name in self.features),
            tuple(self._layouts[name].to_tokens(shown[name], image) for name in self.embeddings),
            image,
        )

    def _run(self, image: Tensor) -> tuple[Any, dict[str, Any]]:
        """Give the module's own output, and what each tap showed."""
        records = self._taps.open()
        try:
            output = self.module(image)
            for name, shown in records.items():
                if len(shown) != 1:
                    raise UserError(
                        f"tap {name!r} fired {len(shown)} times in one forward of {self.name}, expected once; "
                        f"tap a submodule that runs once, such as {_near(name, self.module)}"
                    )
            return output, {name: shown[0] for name, shown in records.items()}
        finally:
            records.clear()

    def _shown_logits(self, output: Any, shown: dict[str, Any], image: Tensor) -> Tensor:
        if self.logits is not None:
            return self._layouts[self.logits].to_map(shown[self.logits], image)
        logits = _own_logits(output)
        if logits is None or logits.shape[1] != self.num_classes:
            raise UserError(
                f"{self.name} gave {_describe(output)}, expected logits [B, {self.num_classes}, h, w] as at "
                "construction; name the submodule that always gives them: logits=…"
            )
        return logits

    def _probe(self, size: tuple[int, int]) -> tuple[dict[str, "_Layout"], int]:
        """Learn each tap's layout and the number of classes, and leave everything as it was."""
        height, width = size
        image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0), device="cpu")
        image = self.normalise(image.to(self.mean))
        modes = {module: module.training for module in self.module.modules()}
        try:
            with torch.no_grad(), torch.random.fork_rng([image.device] if image.is_cuda else []):
                self.module.eval()
                with _unchanged(self.module, self._taps.names):
                    output, shown = self._run(image)
        except UserError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.name} does not take the probe, an image of {height} x {width}: {reason}; "
                "give a size that it takes: probe=(H, W)"
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
        layouts = {name: _Layout.learn(name, tap, image, self.module) for name, tap in shown.items()}
        if self.logits is not None:
            return layouts, layouts[self.logits].channels
        logits = _own_logits(output)
        return layouts, 0 if logits is None or "BCHW" not in _readings(logits, image) else logits.shape[1]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Give the wrapped module's own, under its own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load what the wrapped module loads."""
        return self.module.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The way in from a module around this one, which then goes on to self.module under the prefix "….module.".
        own = [key for key in state_dict if key.startswith(prefix)]
        state_dict.update({f"{prefix}module.{key[len(prefix) :]}": state_dict.pop(key) for key in own})
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Taps:
    """The hooks on a module and their records; the hooks go when this goes."""

    handles: Sequence[RemovableHandle] = ()

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        modules = dict(module.named_modules(remove_duplicate=False))
        self.names = tuple(dict.fromkeys(names))
        for name in self.names:
            if name not in modules:
                raise UserError(
                    f"no submodule {name!r} to tap in {type(module).__name__}; there are {_near(name, module)} "
                    "(names are those of module.named_modules())"
                )
        self.records: dict[str, list[Any]] = {}
        self.handles = [modules[name].register_forward_hook(_Tap(name, self.records)) for name in self.names]

    def open(self) -> dict[str, list[Any]]:
        """Let the hooks write until the records are cleared."""
        self.records.update({name: [] for name in self.names})
        return self.records

    def remove(self) -> None:
        """Take the hooks off the module."""
        for handle in self.handles:
            handle.remove()

    def __del__(self) -> None:
        self.remove()


class _Tap:
    """A forward hook that writes down what its submodule gives; an object, so that copies have records of their own."""

    def __init__(self, name: str, records: dict[str, list[Any]]) -> None:
        self.name, self.records = name, records

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.name in self.records:  # else somebody runs the module by itself
            self.records[self.name].append(output)


@contextmanager
def _unchanged(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """See that nothing that a tap shows within is written over afterwards."""
    seen: dict[str, tuple[Tensor, int]] = {}

    def note(name: str, module: nn.Module, args: Any, shown: Any) -> None:
        tensor = _first(shown)
        if tensor is not None and not tensor.is_inference():  # those count no versions
            seen[name] = tensor, tensor._version

    handles = [module.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, (tensor, version) in seen.items():
        if tensor._version != version:
            raise UserError(
                f"what tap {name!r} gives is changed in place later in the forward, as by ReLU(inplace=True); "
                "tap the submodule that changes it, or set its inplace to False"
            )


class _Layout(NamedTuple):
    """How one tap's tensor lies, learnt from the probe: ``axes`` is a key of LAYOUTS."""

    name: str
    axes: str
    channels: int
    strides: tuple[int, ...]

    @classmethod
    def learn(cls, name: str, shown: Any, image: Tensor, module: nn.Module) -> "_Layout":
        """Read the only layout that fits what a tap showed of the probe."""
        tensor, size = _first(shown), tuple(image.shape[-2:])
        if tensor is None:
            raise UserError(
                f"tap {name!r} gives {_describe(shown)}, expected a tensor or a tuple that starts with one; "
                f"tap another submodule, such as {_near(name, module)}"
            )
        readings = _readings(tensor, image)
        what = f"tap {name!r} gives {_describe(tensor)} for an image of {size[0]} x {size[1]}"
        if not readings:
            raise UserError(
                f"{what}, expected {', '.join(LAYOUTS.values())} that fits the image over a stride (no class token); "
                "tap another submodule, or give the size that the module is made for: probe=(H, W)"
            )
        if len(readings) > 1:
            raise UserError(
                f"{what}, which may be {' or '.join(LAYOUTS[axes] for axes in readings)}, expected one of them; "
                "give another size, not square: probe=(H, W)"
            )
        (axes,) = readings
        strides = tuple(stride for stride in STRIDES if axes == "BNC" and _grid(tensor.shape[1], size, [stride]))
        return cls(name, axes, tensor.shape[axes.index("C")], strides)

    def to_map(self, shown: Any, image: Tensor) -> Tensor:
        """Give [B, C, H, W]."""
        tensor = self._checked(shown, image)
        if self.axes == "BCHW":
            return tensor
        if self.axes == "BHWC":
            return tensor.permute(0, 3, 1, 2)
        return tensor.transpose(1, 2).reshape(len(tensor), self.channels, *self._grid(tensor, image))

    def to_tokens(self, shown: Any, image: Tensor) -> Tensor:
        """Give [B, N, C]."""
        tensor = self._checked(shown, image)
        if self.axes == "BCHW":
            return tensor.flatten(2).transpose(1, 2)
        return tensor.flatten(1, 2) if self.axes == "BHWC" else tensor

    def _grid(self, tensor: Tensor, image: Tensor) -> tuple[int, int]:
        return _grid(tensor.shape[1], image.shape[-2:], self.strides) or (0, 0)

    def _checked(self, shown: Any, image: Tensor) -> Tensor:
        tensor = _first(shown)
        if (
            tensor is not None
            and tensor.ndim == len(self.axes)
            and (len(tensor), tensor.shape[self.axes.index("C")]) == (len(image), self.channels)
            and (self.axes != "BNC" or all(self._grid(tensor, image)))
        ):
            return tensor
        what = _describe(shown if tensor is None else tensor)
        raise UserError(
            f"tap {self.name!r} gives {what} for images {list(image.shape)}, expected {LAYOUTS[self.axes]} with "
            f"C = {self.channels} as the probe showed; give a probe of the images' size: probe=(H, W)"
        )


def _readings(tensor: Tensor, image: Tensor) -> list[str]:
    """Name every layout that a tensor can be read in."""
    if tensor.ndim not in (3, 4) or len(tensor) != len(image):
        return []
    size = tuple(image.shape[-2:])
    if tensor.ndim == 3:
        return ["BNC"] if _grid(tensor.shape[1], size, STRIDES) else []
    sides = {"BCHW": tensor.shape[2:], "BHWC": tensor.shape[1:3]}
    on_grid = [axes for axes, (h, w) in sides.items() if _grid(h * w, size, STRIDES) == (h, w)]
    # Convolutions without padding, or of another stride, leave the image's shape to within a few pixels.
    return on_grid or [axes for axes, (h, w) in sides.items() if w and 0.9 < h / w * size[1] / size[0] < 1.1]


def _grid(tokens: int, size: Sequence[int], strides: Iterable[int]) -> tuple[int, int] | None:
    """Give the grid (h, w) of so many tokens that is the image over a stride, rounded up or down; one at most is."""
    height, width = size
    for stride in strides:
        for grid in ((-(-height // stride), -(-width // stride)), (height // stride, width // stride)):
            if grid[0] * grid[1] == tokens:
                return grid
    return None


def _first(shown: Any) -> Tensor | None:
    if isinstance(shown, (tuple, list)) and shown:
        shown = shown[0]
    return shown if isinstance(shown, Tensor) else None


def _own_logits(output: Any) -> Tensor | None:
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits", output.get("out"))
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.ndim == 4 else None


def _describe(shown: Any) -> str:
    return f"a tensor of shape {list(shown.shape)}" if isinstance(shown, Tensor) else f"a {type(shown).__name__}"


def _near(name: str, module: nn.Module) -> str:
    """Name a few submodules that may be meant: the children of that one, else names like it, else the first."""
    names = [other for other, _ in module.named_modules() if other not in ("", name)]
    children = [other for other in names if other.rpartition(".")[0] == name]
    return ", ".join((children or difflib.get_close_matches(name, names, n=5) or names)[:5])

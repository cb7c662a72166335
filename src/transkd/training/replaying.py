"""Compute a captured step again, and name the first module whose output is not finite."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from transkd.cli import import_plugins
from transkd.command.yaml_files import load_config
from transkd.errors import UserError
from transkd.losses import Criterion
from transkd.models import Network, add_lora
from transkd.outputs import SegmentationOutput
from transkd.settings import TrainSettings
from transkd.training import build
from transkd.training.capture import read_capture

__all__ = ["replay"]


def replay(path: Path, device: torch.device | None = None) -> list[str]:
    """Compute the student's forward pass and the terms of a captured step again.

    Args:
        path: a run's folder, or its ``not_finite.pt``; ``config.yaml`` lies beside it.
        device: where to compute; default: the CPU. Random numbers, as of dropout, are the step's on its own device.

    Returns:
        Lines for a reader: the step, each term's value then and now, and the first module that is not finite.

    Raises:
        UserError: a file is missing or not of such a run.
    """
    captured = read_capture(path)
    folder = path if path.is_dir() else path.parent
    cfg = _configuration(folder / "config.yaml")
    student, criterion = _rebuild(cfg, captured)
    device = device or torch.device("cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no such device here; expected cpu")
    broken = [name for name, tensor in captured["weights"].items() if not _is_finite(tensor)]
    found: list[str] = []
    hooks = [module.register_forward_hook(_reporter(name, found)) for name, module in _named(student, criterion)]
    values = _compute(student.to(device), criterion.to(device), captured, device)
    for hook in hooks:
        hook.remove()
    lines = [f"epoch {captured['epoch']}, step {captured['step']}; files: {'; '.join(map(str, captured['names']))}"]
    lines += [
        f"{name}: {captured['values'][name].item():g} then, {value.item():g} now" for name, value in values.items()
    ]
    lines.append(f"weights that are not finite: {', '.join(broken[:6]) or 'none'}")
    lines.append(f"first module whose output is not finite: {found[0] if found else 'none'}")
    return lines


def _configuration(file: Path) -> DictConfig:
    if not file.is_file():
        raise UserError(f"there is no {file}, which says how the networks of the run were built")
    return load_config(file)


def _rebuild(cfg: DictConfig, captured: Mapping[str, Any]) -> tuple[Network, Criterion]:
    """Network and terms as they were when the step began."""
    settings = TrainSettings.read(cfg)
    import_plugins(settings.plugins)
    if captured["part"] == "teacher":
        student, criterion = build.instantiated(cfg.teacher.network), build.build_task(cfg)
    else:
        student, criterion = build.instantiated(cfg.student.network), build.instantiated(cfg.criterion)
        lora = settings.student.lora
        if lora.rank is not None:
            add_lora(student, lora.rank, lora.train, lora.keep_drop_path)
    both = nn.ModuleDict({"student": student, "criterion": criterion})
    differing = both.load_state_dict(captured["weights"], strict=False)
    if differing.missing_keys or differing.unexpected_keys:
        raise UserError(
            "the step is of other networks or terms than config.yaml beside it says: "
            + ", ".join([*differing.missing_keys, *differing.unexpected_keys][:6])
        )
    for buffer, key in ((student.mean, "mean"), (student.std, "std")):
        buffer.copy_(captured[key])
    criterion.factors.update(captured["factors"])
    both.to(next(t.dtype for t in captured["weights"].values() if t.is_floating_point()))
    return student.train(), criterion.train()


def _compute(
    student: Network, criterion: Criterion, captured: Mapping[str, Any], device: torch.device
) -> Mapping[str, Tensor]:
    fabric = L.Fabric(accelerator=device.type, devices=1, precision=captured["precision"])
    image, target = (part.to(device) for part in captured["batch"])
    teacher = None
    if captured["teacher"] is not None:
        teacher = SegmentationOutput(*(_to(part, device) for part in captured["teacher"]))
    torch.set_rng_state(captured["random"]["cpu"])
    if device.type == "cuda" and "cuda" in captured["random"]:
        torch.cuda.set_rng_state(captured["random"]["cuda"], device)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    with fabric.autocast():
        return criterion(student(image), teacher, target, parameters if criterion.calibrating else ()).values


def _to(part: Any, device: torch.device) -> Any:
    if isinstance(part, list):
        return tuple(tensor.to(device) for tensor in part)
    return part if part is None else part.to(device)


def _named(student: Network, criterion: Criterion) -> list[tuple[str, nn.Module]]:
    """Modules without submodules, and the terms, by name."""
    leaves = [(f"student.{name}", module) for name, module in student.named_modules() if not any(module.children())]
    return [*leaves, *((f"criterion.terms.{name}", term) for name, term in criterion.terms.items())]


def _reporter(name: str, found: list[str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not _is_finite(output):
            found.append(name)

    return hook


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all()) if tensor.is_floating_point() else True

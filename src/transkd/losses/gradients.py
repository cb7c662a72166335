"""What each term's gradient does to the student, compared with the task's."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["gradient_norm", "gradient_statistics"]


def gradient_norm(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Euclidean norm of a scalar's gradient with respect to parameters; the graph stays for the backward pass.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> gradient_norm(weight.square().sum() / 2, [weight])
        tensor(5.)
    """
    return _flat_gradient(value, parameters).norm()


def gradient_statistics(
    values: Mapping[str, Tensor], parameters: Sequence[nn.Parameter], task: str = "task"
) -> dict[str, Tensor]:
    """Norm of each term's gradient on the student, before its weight, and its cosine with the task's.

    A cosine near 0 is a term that teaches something else than the task, below 0 one that works against it.

    Args:
        values: the terms' scalars by name, as `Criterion` gives them.
        parameters: the student's.
        task: the name of the task's term.

    Returns:
        ``<name>/norm`` for each term and ``<name>/cosine`` for each but the task; no cosine without a task.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> gradient_statistics({"task": weight.sum(), "kd": weight[0]}, [weight])["kd/cosine"]
        tensor(0.7071)
    """
    gradients = {name: _flat_gradient(value, parameters) for name, value in values.items()}
    norms = {name: gradient.norm() for name, gradient in gradients.items()}
    statistics = {f"{name}/norm": norm for name, norm in norms.items()}
    if task in gradients:
        for name in gradients.keys() - {task}:
            length = (norms[name] * norms[task]).clamp_min(torch.finfo(norms[name].dtype).tiny)
            statistics[f"{name}/cosine"] = gradients[name] @ gradients[task] / length
    return statistics


def _flat_gradient(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """One vector; zeros for parameters that the value does not depend on."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if gradient is None else gradient).flatten().float()
            for gradient, parameter in zip(gradients, trained, strict=True)
        ]
    )

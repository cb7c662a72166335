"""Norms of the terms' gradients on the student and their cosines with the task's gradient."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["gradient_norm", "gradient_statistics"]


def gradient_norm(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Euclidean norm of a scalar's gradient with respect to parameters; the graph is retained for the backward pass.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> gradient_norm(weight.square().sum() / 2, [weight])
        tensor(5.)
    """
    return _flat_gradient(value, parameters).norm()


def gradient_statistics(
    values: Mapping[str, Tensor], parameters: Sequence[nn.Parameter], task: str = "task"
) -> dict[str, Tensor]:
    """Norm of each term's unweighted gradient on the student, and its cosine with the task's gradient.

    A cosine near 0 means that the term's gradient is orthogonal to the task's, below 0 that it opposes it.

    Args:
        values: values of the terms by name, as `Criterion` returns them.
        parameters: of the student.
        task: name of the task's term.

    Returns:
        ``<name>/norm`` for each term and, if the task is among them, ``<name>/cosine`` for every other term.

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
    """Gradient as one vector, with zeros for parameters that the value does not depend on."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(value, trainable, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if gradient is None else gradient).flatten().float()
            for gradient, parameter in zip(gradients, trainable, strict=True)
        ]
    )

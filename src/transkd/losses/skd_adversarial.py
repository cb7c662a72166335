"""Structured knowledge distillation, holistic part: a discriminator on both networks' logits."""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

from transkd.errors import UserError
from transkd.losses.shared.adapters import as_weights
from transkd.losses.shared.checks import check_choice, check_count, check_positive
from transkd.losses.shared.distances import widen
from transkd.losses.shared.grids import GRIDS, logits_pair
from transkd.losses.shared.pieces import full_precision, positions_of
from transkd.outputs import SegmentationOutput

__all__ = [
    "LogitDiscriminator",
    "SKDAdversarialLoss",
    "gradient_penalty",
    "hinge_objective",
    "student_objective",
    "wasserstein_objective",
]

KINDS = ("hinge", "wgan")
SMALLEST = 64
"""Smallest side of the logits: four convolutions of stride 2 leave the 4×4 of the last convolution."""


class SKDAdversarialLoss(nn.Module):
    """Adversarial distillation: a discriminator D separates both networks' logits, the student maximises its score.

    ``L = −mean D(z_s) + discriminator_weight · L_D``. D's parameters are detached in the first summand, the logits in
    the second, so one optimiser trains both networks, each on its own summand. L_D is one of

        hinge: mean max(0, 1 − D(z_t)) + mean max(0, 1 + D(z_s))
        wgan:  mean D(z_s) − mean D(z_t) + gradient_penalty · mean_b (‖∇_x D(x_b)‖ − 1)²,  x = a·z_t + (1 − a)·z_s,
               a sampled uniformly for each image with torch's global generator

    The value is not a distance and need not decrease. Both logits pass through D in one batch, so its batch statistics
    are common to both; see `LogitDiscriminator` for the architecture. D is not part of the trained student. In
    distributed training D's batch statistics are those of each process's own logits, so its scores differ from those of
    one process with the joined batch.

    Source: Liu et al., arXiv 1903.04197, its holistic distillation. D in the paper also reads the image; published
    implementations use the logits alone. Their weights of the two summands are 0.001 and 0.1 (CIRKD, hinge) or 0.1 and
    0.1 (the authors, wgan): here a term weight of 0.001 with `discriminator_weight` 100, or 0.1 with 1. They train D in
    a separate step with its own optimiser (CIRKD: Adam, 4e-4, β = (0.9, 0.99); the authors: SGD, 4e-4) and normalise
    each network's logits separately. Here D uses the student's optimiser, learning rate, weight decay and clipping, and
    both summands use the same D. With Adam, `discriminator_weight` changes the value more than D's updates.

    Args:
        num_classes: K, channels of the logits.
        kind: "hinge" (CIRKD) or "wgan" (the authors).
        discriminator_weight: weight of L_D relative to the student's summand; 100 = 0.1 / 0.001.
        gradient_penalty: weight of the penalty in "wgan"; 10 in the authors' code.
        width: channels of D's first block, even; the following blocks have 2, 4 and 8 times as many.
        grid: size at which to compare: that of the "teacher" logits, the "student" logits or the "labels"; logits of
            another size are resized bilinearly, align_corners=False.

    Shapes:
        Logits [B, K, h, w] of both, at least 64×64 on the chosen grid, for grid "labels" a target [B, H, W], to a
        scalar, float32 or float64.

    Raises:
        UserError: the kind or grid is unknown, a weight is not positive, the width is odd, logits are missing, have
            other than K classes or are smaller than 64×64.

    Example:
        >>> def output():
        ...     return SegmentationOutput(torch.randn(1, 5, 64, 64), (), (), torch.rand(1, 3, 256, 256))
        >>> SKDAdversarialLoss(num_classes=5, width=2)(output(), output()).shape
        torch.Size([])
    """

    needs = frozenset({"logits"})

    def __init__(
        self,
        num_classes: int,
        kind: str = "hinge",
        discriminator_weight: float = 100.0,
        gradient_penalty: float = 10.0,
        width: int = 64,
        grid: str = "teacher",
    ) -> None:
        super().__init__()
        check_count(self, "num_classes", num_classes, least=2)
        check_choice(self, "kind", kind, KINDS)
        check_positive(self, "discriminator_weight", discriminator_weight)
        check_positive(self, "gradient_penalty", gradient_penalty)
        check_count(self, "width", width, least=2)
        if width % 2:
            raise UserError(f"SKDAdversarialLoss: width must be an even number; got {width}.")
        check_choice(self, "grid", grid, GRIDS)
        self.num_classes, self.kind, self.grid = num_classes, kind, grid
        self.discriminator_weight, self.gradient_penalty = discriminator_weight, gradient_penalty
        self.discriminator = LogitDiscriminator(num_classes, width)

    def forward(
        self, student: SegmentationOutput, teacher: SegmentationOutput | None, target: Tensor | None = None
    ) -> Tensor:
        """Compute the student's summand plus the weighted loss of the discriminator."""
        pair = logits_pair(self, student, teacher, self.grid, target)
        self._check(pair[0])
        with full_precision(pair[0]):
            return self.student_part(*pair) + self.discriminator_weight * self.discriminator_part(*pair)

    def student_part(self, student: Tensor, teacher: Tensor) -> Tensor:
        """−mean D(z_s) of logits [B, K, h, w]; D's parameters are detached and its buffers are not updated."""
        constants = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        both = torch.cat((student, teacher.detach()))
        scores = functional_call(self.discriminator, (constants, self._copied_buffers()), (both,))
        return student_objective(scores[: len(student)])

    def discriminator_part(self, student: Tensor, teacher: Tensor) -> Tensor:
        """L_D of detached logits [B, K, h, w]; in training mode it updates the discriminator's buffers."""
        student, teacher = student.detach(), teacher.detach()

        def critic(mixed: Tensor) -> Tensor:
            return functional_call(self.discriminator, self._copied_buffers(), (mixed,))

        penalty = self.gradient_penalty * gradient_penalty(critic, student, teacher) if self.kind == "wgan" else None
        student_scores, teacher_scores = self.discriminator(torch.cat((student, teacher))).chunk(2)
        if penalty is None:
            return hinge_objective(student_scores, teacher_scores)
        return wasserstein_objective(student_scores, teacher_scores) + penalty

    def _copied_buffers(self) -> dict[str, Tensor]:
        # copies: of the forward passes of a step, only the last updates running statistics and power iteration
        return {name: buffer.clone() for name, buffer in self.discriminator.named_buffers()}

    def _check(self, logits: Tensor) -> None:
        classes, *size = logits.shape[1:]
        if classes != self.num_classes:
            raise UserError(
                f"SKDAdversarialLoss was built with num_classes={self.num_classes}, but the logits have {classes} "
                f"classes. Build it with num_classes={classes}."
            )
        if min(size) < SMALLEST:
            raise UserError(
                f"SKDAdversarialLoss: its discriminator reads logits of at least {SMALLEST}×{SMALLEST}; got "
                f"{size[0]}×{size[1]}. Use larger images or crops, or upsample the logits to the labels: grid=labels."
            )


class LogitDiscriminator(nn.Module):
    """Patch discriminator: scores [B, 1, h/16 − 3, w/16 − 3] of logits [B, K, h, w].

    Batch normalisation; four convolutions 4×4 of stride 2 with spectral normalisation (one power iteration per pass in
    training), each followed by LeakyReLU(0.1), of 1, 2, 4 and 8 times `width` channels; self-attention over the
    positions after the third and the fourth; a 4×4 convolution without padding to the score. Attention is initialised
    as the identity (γ = 0), so its convolutions get no gradient until γ has changed.

    Args:
        num_classes: K.
        width: channels of the first convolution.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_classes)
        widths = [num_classes, width, 2 * width, 4 * width, 8 * width]
        blocks = [_block(*pair) for pair in pairwise(widths)]
        attention = [SelfAttention(channels) for channels in widths[-2:]]
        self.layers = nn.Sequential(
            OrderedDict(
                block1=blocks[0],
                block2=blocks[1],
                block3=blocks[2],
                attention3=attention[0],
                block4=blocks[3],
                attention4=attention[1],
            )
        )
        self.score = nn.Conv2d(widths[-1], 1, 4)

    def forward(self, logits: Tensor) -> Tensor:
        """Compute the scores."""
        return widen(self.score(self.layers(self.norm(as_weights(self.norm, logits)))))


class SelfAttention(nn.Module):
    """Residual self-attention over positions, ``x + γ · Σ_j softmax_j(q(x_i) · k(x_j)) v(x_j)``, of [B, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, maps: Tensor) -> Tensor:
        """Add the attended values, scaled by γ."""
        query, key, value = (positions_of(layer(maps))[:, None] for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return maps + self.gamma * attended[:, 0].mT.reshape(maps.shape)


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = spectral_norm(nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1), n_power_iterations=1)
    return nn.Sequential(OrderedDict(conv=convolution, activation=nn.LeakyReLU(0.1)))


def student_objective(student: Tensor) -> Tensor:
    """Objective of the student from the scores of its logits.

    Example:
        >>> student_objective(torch.tensor([1.0, 3.0]))
        tensor(-2.)
    """
    return -student.mean()


def hinge_objective(student: Tensor, teacher: Tensor) -> Tensor:
    """Hinge objective of the discriminator: teacher scores above 1, student scores below −1.

    Example:
        >>> hinge_objective(torch.tensor([-3.0]), torch.tensor([0.5]))
        tensor(0.5000)
    """
    return F.relu(1 - teacher).mean() + F.relu(1 + student).mean()


def wasserstein_objective(student: Tensor, teacher: Tensor) -> Tensor:
    """Wasserstein objective of the discriminator, without the penalty.

    Example:
        >>> wasserstein_objective(torch.tensor([1.0]), torch.tensor([3.0]))
        tensor(-2.)
    """
    return student.mean() - teacher.mean()


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor, *, share: Tensor | None = None
) -> Tensor:
    """Gradient penalty between both networks' logits: mean over images of (‖∇ mean score‖ − 1)².

    Args:
        critic: logits [B, K, h, w] to scores, [B, …].
        student: [B, K, h, w]; detached.
        teacher: [B, K, h, w]; detached.
        share: interpolation weight of the teacher per image, [B, 1, 1, 1]; None samples it uniformly from [0, 1).

    Returns:
        A scalar, differentiable in the critic's parameters.

    Example:
        >>> logits = torch.rand(2, 1, 1, 4)
        >>> gradient_penalty(lambda x: 3 * x.sum((2, 3)), logits, logits)  # the gradient's norm is 3 · √4
        tensor(25.)
    """
    if share is None:
        share = torch.rand(len(student), 1, 1, 1, device=student.device, dtype=student.dtype)
    mixed = (share * teacher + (1 - share) * student).detach().requires_grad_()
    differentiable = torch.is_grad_enabled()
    # MATH: the fused attention kernels have no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        scores = critic(mixed).flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(scores.sum(), mixed, create_graph=differentiable)
    return (torch.linalg.vector_norm(gradient.flatten(1), dim=1) - 1).square().mean()

"""Structured knowledge distillation, its holistic part: a discriminator between two networks' logits."""

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
from transkd.losses.shared.checks import check_choice, check_count, check_positive
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
"""Sides of a map of which four halvings leave the 4×4 that the last convolution reads."""


class SKDAdversarialLoss(nn.Module):
    """Train a discriminator D to tell the networks' logits apart, and the student to pass for the teacher.

    ``L = −mean D(z_s) + discriminator_weight · L_D``; the first part sees D's parameters as constants, the second the
    logits, so one optimiser trains both networks, each on its own part alone. L_D is one of

        hinge: mean max(0, 1 − D(z_t)) + mean max(0, 1 + D(z_s))
        wgan:  mean D(z_s) − mean D(z_t) + gradient_penalty · mean_b (‖∇_x D(x_b)‖ − 1)²,  x = a·z_t + (1 − a)·z_s,
               a drawn uniformly for each image, from torch's global generator

    The term's value is no distance: it need not fall. Both logits go through D in one batch, for statistics that
    hold for both; `LogitDiscriminator` says what D is. It is dropped after training. In each of several processes D
    normalises by the logits of the process's own images, so its scores are not those of the joined batch.

    Source: Liu et al., arXiv 1903.04197, its holistic distillation, whose D also reads the image; D on the logits alone
    is the published codes'. They weigh the parts 0.001 and 0.1 (CIRKD, hinge) or 0.1 and 0.1 (the authors, wgan): a
    term's weight of 0.001 with `discriminator_weight` 100, or of 0.1 with 1. D learns otherwise there: in a step of its
    own, with an optimiser of its own (CIRKD: Adam, 4e-4, β = (0.9, 0.99); the authors: SGD, 4e-4), and with each
    network's logits normalised apart. Here D has the student's optimiser, rate, weight decay and clipping, and both
    learn from the same D; under an optimiser of Adam's kind `discriminator_weight` moves the value more than D's steps.

    Args:
        num_classes: K, channels of the logits.
        kind: "hinge" (CIRKD) or "wgan" (the authors).
        discriminator_weight: of L_D beside the student's part; 0.1 / 0.001.
        gradient_penalty: weight of the penalty within "wgan"; 10 as in the authors' code.
        width: channels of D's first block, an even number; the following have 2, 4 and 8 times as many.
        grid: where to compare: "teacher" resizes the student's logits to the teacher's, "student" the teacher's to the
            student's, "labels" both to the labels, for logits that are too small; bilinear, align_corners=False.

    Shapes:
        Logits [B, K, h, w] of both, at least 64×64 on the chosen grid, for grid "labels" a target [B, H, W], to a
        scalar, float32 or float64.

    Raises:
        UserError: an unknown kind or grid, weights that are not positive, an odd width, no logits, networks with other
            than K classes, or logits smaller than 64×64.

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
        """Score both networks' logits, once for the student and once for the discriminator."""
        mine, other = logits_pair(self, student, teacher, self.grid, target)
        self._check(mine)
        with full_precision(mine):
            return self.student_part(mine, other) + self.discriminator_weight * self.discriminator_part(mine, other)

    def student_part(self, student: Tensor, teacher: Tensor) -> Tensor:
        """−mean D(z_s) of logits [B, K, h, w]; the discriminator is a constant, its buffers stay as they are."""
        constants = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        both = torch.cat((student, teacher.detach()))
        scores = functional_call(self.discriminator, (constants, self._copied_buffers()), (both,))
        return student_objective(scores[: len(student)])

    def discriminator_part(self, student: Tensor, teacher: Tensor) -> Tensor:
        """L_D of logits [B, K, h, w], which are constants; in training it updates the discriminator's buffers."""
        student, teacher = student.detach(), teacher.detach()

        def critic(mixed: Tensor) -> Tensor:
            return functional_call(self.discriminator, self._copied_buffers(), (mixed,))

        penalty = self.gradient_penalty * gradient_penalty(critic, student, teacher) if self.kind == "wgan" else None
        of_student, of_teacher = self.discriminator(torch.cat((student, teacher))).chunk(2)
        if penalty is None:
            return hinge_objective(of_student, of_teacher)
        return wasserstein_objective(of_student, of_teacher) + penalty

    def _copied_buffers(self) -> dict[str, Tensor]:
        # a step has several passes; the running statistics and the power iteration move once, with the last
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
                f"{size[0]}×{size[1]}. Use larger images or crops, or enlarge the logits to the labels: grid=labels."
            )


class LogitDiscriminator(nn.Module):
    """Score logits [B, K, h, w] at [B, 1, h/16 − 3, w/16 − 3] places.

    Batch normalisation; four convolutions 4×4 of stride 2 with spectral normalisation (one power iteration per pass in
    training), each followed by LeakyReLU(0.1), of 1, 2, 4 and 8 times `width` channels; self-attention over the
    positions behind the third and the fourth; a convolution 4×4 without padding to the score. Attention starts as the
    identity (γ = 0), so its convolutions have no gradient before γ has moved.

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
        """Score the places."""
        scores: Tensor = self.score(self.layers(self.norm(logits)))
        return scores


class SelfAttention(nn.Module):
    """Positions look at each other: ``x + γ · Σ_j softmax_j(q(x_i) · k(x_j)) v(x_j)``, maps [B, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, maps: Tensor) -> Tensor:
        """Add what is looked at."""
        query, key, value = (positions_of(layer(maps))[:, None] for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return maps + self.gamma * attended[:, 0].mT.reshape(maps.shape)


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = spectral_norm(nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1), n_power_iterations=1)
    return nn.Sequential(OrderedDict(conv=convolution, activation=nn.LeakyReLU(0.1)))


def student_objective(student: Tensor) -> Tensor:
    """What the student minimises, of the scores of its logits.

    Example:
        >>> student_objective(torch.tensor([1.0, 3.0]))
        tensor(-2.)
    """
    return -student.mean()


def hinge_objective(student: Tensor, teacher: Tensor) -> Tensor:
    """What the discriminator minimises: the teacher's scores above 1, the student's below −1.

    Example:
        >>> hinge_objective(torch.tensor([-3.0]), torch.tensor([0.5]))
        tensor(0.5000)
    """
    return F.relu(1 - teacher).mean() + F.relu(1 + student).mean()


def wasserstein_objective(student: Tensor, teacher: Tensor) -> Tensor:
    """What the discriminator minimises: the student's scores below the teacher's, before the penalty.

    Example:
        >>> wasserstein_objective(torch.tensor([1.0]), torch.tensor([3.0]))
        tensor(-2.)
    """
    return student.mean() - teacher.mean()


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor, *, share: Tensor | None = None
) -> Tensor:
    """Mean over images of (‖∇ of the mean score‖ − 1)², between both networks' logits.

    Args:
        critic: logits [B, K, h, w] to scores, [B, …].
        student: [B, K, h, w]; a constant.
        teacher: [B, K, h, w]; a constant.
        share: the teacher's share of each image, [B, 1, 1, 1]; None draws it uniformly from [0, 1).

    Returns:
        A scalar, differentiable in the critic's parameters.

    Example:
        >>> logits = torch.rand(2, 1, 1, 4)
        >>> gradient_penalty(lambda x: 3 * x.sum((2, 3)), logits, logits)  # the gradient's length is 3 · √4
        tensor(25.)
    """
    if share is None:
        share = torch.rand(len(student), 1, 1, 1, device=student.device, dtype=student.dtype)
    mixed = (share * teacher + (1 - share) * student).detach().requires_grad_()
    learns = torch.is_grad_enabled()
    # the fused kernels of attention have no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        scores = critic(mixed).flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(scores.sum(), mixed, create_graph=learns)
    return (torch.linalg.vector_norm(gradient.flatten(1), dim=1) - 1).square().mean()

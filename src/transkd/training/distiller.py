"""The one LightningModule: a frozen teacher, a trainable student, a criterion between them."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transkd.data.classes import ClassSet
from transkd.errors import UserError
from transkd.losses import Criterion, Progress, gradient_statistics
from transkd.metrics import Scores, SegmentationScore
from transkd.models import FrozenTeacher, Network
from transkd.models.storage.card import CARD, describe

__all__ = ["Distiller"]


class Distiller(L.LightningModule):
    """Trains a student under a criterion and, where some term reads one, a frozen teacher.

    Args:
        student: the network to train and deploy.
        criterion: named, weighted terms; its own parameters are trained beside the student's.
        classes: names and colours of the classes.
        teacher: None where no term reads it.
        optimizer: ``optimizer(params)``; None for scoring alone.
        scheduler: ``scheduler(optimizer, total=…)``; None keeps the rate constant.
        interval: the scheduler's tick, "step" or "epoch".
        horizon: ticks until the rate reaches 0; None takes the length of the run.
        protocol: how validation is scored (``transkd.metrics.PROTOCOLS``).
        gradients_every: steps between two looks at each term's gradient (``gradient_statistics``); 0: none.
        seed: dropout and stochastic depth of epoch e depend on seed and e alone, so that a resumed run repeats them.
        channels_last: whether the networks get their images in that memory format; their weights are the caller's.
        compiled: whether networks and terms are; CUDA graphs of theirs must know where a step begins.
        notes: kept in every checkpoint beside the student's description (the teacher's path and hash).
    """

    def __init__(
        self,
        student: Network,
        criterion: Criterion,
        classes: ClassSet,
        teacher: FrozenTeacher | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        interval: str = "step",
        horizon: int | None = None,
        protocol: str = "full-res",
        gradients_every: int = 0,
        seed: int = 0,
        channels_last: bool = False,
        compiled: bool = False,
        notes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.criterion = criterion
        self.teacher = teacher
        self.classes = classes
        self.optimizer, self.scheduler, self.interval, self.horizon = optimizer, scheduler, interval, horizon
        self.gradients_every, self.seed = gradients_every, seed
        self.compiled = compiled
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.notes = notes or {}
        self.score = SegmentationScore(student.num_classes, protocol)
        self.scores: Scores | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step of distillation."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        image, target, *names = batch
        image = image.to(memory_format=self.memory_format)
        if self.criterion.schedules:
            self.criterion.advance(self._progress())
        student = self.student(image)
        needs = self.criterion.needs
        teacher = self.teacher(image, needs) if self.teacher is not None and needs else None
        looks = self.student_parameters if self.criterion.calibrating else ()
        loss, values = self.criterion(student, teacher, target, looks)
        if not loss.isfinite():  # the one place where a step waits for the device
            raise UserError(self._not_finite(values, names))
        named = {f"train/{name}": value.detach() for name, value in values.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=len(image))
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=True, prog_bar=True, batch_size=len(image))
        if self.gradients_every and batch_idx % self.gradients_every == 0:
            found = gradient_statistics(values, self.student_parameters)
            self.log_dict({f"gradient/{name}": value for name, value in found.items()}, batch_size=len(image))
        return loss

    @property
    def student_parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains of the student."""
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad]

    def _progress(self) -> Progress:
        steps = int(self.trainer.estimated_stepping_batches)
        return Progress(self.global_step, steps, self.trainer.max_epochs or 1)

    def _not_finite(self, values: dict[str, Tensor], names: list[Any]) -> str:
        terms = ", ".join(f"{name}={value.item():g}" for name, value in values.items())
        files = "; ".join(map(str, names[0])) if names else "not named by the data module"
        return (
            f"the loss is not finite at epoch {self.current_epoch}, step {self.global_step} ({terms}); "
            f"files of the batch: {files}. The last good checkpoint is kept: lower the learning rate, "
            "use trainer.precision=32-true or trainer.gradient_clip_val=1, and go on with ckpt_path=last"
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score the student alone."""
        image, target, *_ = batch
        self.score.update(self.student(image.to(memory_format=self.memory_format)).logits, target)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the split, stamped with their protocol."""
        self.scores = self.score.compute()
        self.score.reset()
        stamp = f"val/{self.score.protocol}"
        self.log(f"{stamp}/mIoU", self.scores.miou.float(), prog_bar=True)
        self.log(f"{stamp}/pixel_accuracy", self.scores.pixel_accuracy.float())

    def on_fit_start(self) -> None:
        """A schedule that this run is too short for shows before its first step."""
        if self.criterion.schedules:
            end = self._progress()
            self.criterion.check_schedules(end.steps, end.epochs)

    def on_train_epoch_start(self) -> None:
        """Make the epoch's randomness a function of seed, epoch and rank."""
        torch.manual_seed(self.seed + 100_003 * (self.current_epoch + 1) + 1_000_000_007 * self.global_rank)

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule over the student and whatever the terms train."""
        assert self.optimizer is not None, "a Distiller without an optimizer can only score"
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        run = self.trainer.max_epochs if self.interval == "epoch" else self.trainer.estimated_stepping_batches
        schedule = self.scheduler(optimizer, total=int(self.horizon or run or 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the student in its checkpoint; refuse to replace a good one by weights that are not finite."""
        broken = next((name for name, p in self.named_parameters() if not p.isfinite().all()), None)
        if broken is not None:
            raise UserError(
                f"{broken} is not finite at epoch {self.current_epoch}: this checkpoint was not written, the last "
                "good one is kept. Lower the learning rate or clip gradients (trainer.gradient_clip_val=1)"
            )
        checkpoint[CARD] = describe(self.student, self.classes, **self.notes)

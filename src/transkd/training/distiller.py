"""LightningModule for training: a frozen teacher, a trainable student and a criterion."""

from typing import Any

import torch
from torch import Tensor, nn

from transkd.errors import UserError
from transkd.losses import Criterion, Progress, gradient_statistics
from transkd.models import FrozenTeacher, Network
from transkd.models.storage.card import CARD, describe
from transkd.training.capture import Capture, Step, random_state
from transkd.training.device import Device
from transkd.training.length import length_of
from transkd.training.optimization import Optimization, follow_schedule, groups_of
from transkd.training.scoring import Scorer

__all__ = ["Distiller"]


class Distiller(Scorer):
    """Train a student with a criterion and, if a term reads one, a frozen teacher.

    Args:
        student: the network to train and deploy.
        criterion: named, weighted terms; their parameters are trained together with the student's.
        teacher: None if no term reads it.
        optimization: optimizer and schedule; None for a module that is never fitted.
        protocol: validation protocol (``transkd.metrics.PROTOCOLS``).
        device: memory format of images, and whether networks and terms are compiled.
        notes: stored in every checkpoint with the student's description (classes, the teacher's path and hash).
        gradients_every: steps between logs of each term's gradient (``gradient_statistics``); 0 disables them.
        capture: where a step is written whose loss is not finite; None writes none.
    """

    def __init__(
        self,
        student: Network,
        criterion: Criterion,
        teacher: FrozenTeacher | None = None,
        optimization: Optimization | None = None,
        protocol: str = "full-res",
        device: Device | None = None,
        notes: dict[str, Any] | None = None,
        gradients_every: int = 0,
        capture: Capture | None = None,
    ) -> None:
        super().__init__(student, protocol, device)
        self.criterion = criterion
        self.teacher = teacher
        self.optimization = optimization
        self.notes = notes or {}
        self.gradients_every = gradients_every
        self.capture = capture
        self.step_taken: Step | None = None
        self.configured: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the loss of one batch and log the terms."""
        if self.compiled:  # CUDA graphs overwrite a step's outputs at the next step
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        random = random_state(self.device)
        image, target, *names = batch
        image = image.to(memory_format=self.memory_format)
        if self.criterion.schedules:
            self.criterion.advance(self._progress())
        student = self.student(image)
        needs = self.criterion.needs
        teacher = self.teacher(image, needs) if self.teacher is not None and needs else None
        parameters = self.student_parameters if self.criterion.calibrating else ()
        loss, values = self.criterion(student, teacher, target, parameters)
        self.step_taken = Step.watch(loss, [image, target, *names], values, random)
        named = {f"train/{name}": value.detach() for name, value in values.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=len(image))
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=True, prog_bar=True, batch_size=len(image))
        if self.gradients_every and batch_idx % self.gradients_every == 0:
            found = gradient_statistics(values, self.student_parameters)
            self.log_dict({f"gradient/{name}": value for name, value in found.items()}, batch_size=len(image))
        return loss

    @property
    def student_parameters(self) -> list[nn.Parameter]:
        """Parameters of the student that require grad."""
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad]

    def _progress(self) -> Progress:
        length = length_of(self.trainer)
        if length is None:
            raise UserError(
                "a term has a schedule, but the run has no length for it: set trainer.max_epochs or trainer.max_steps"
            )
        return Progress(self.global_step, length.steps, length.epochs)

    def _stop_if_not_finite(self) -> None:
        """Raise an error, and write the step, if its loss is not finite; the weights are still those of the step."""
        step, self.step_taken = self.step_taken, None
        if step is None or step.is_finite():
            return
        terms = ", ".join(f"{name}={value.item():g}" for name, value in step.values.items())
        names = list(step.batch[2]) if len(step.batch) > 2 else ["not named by the data module"]
        saved = "" if self.capture is None else self._write(step, names, self.capture)
        raise UserError(
            f"the loss is not finite at epoch {self.current_epoch}, step {self.global_step} ({terms}); "
            f"files of the batch: {'; '.join(map(str, names))}. {self._way_on()}{saved}"
        )

    def _way_on(self) -> str:
        """What to do about a loss that is not finite: a teacher, or the first epoch, has no checkpoint to resume."""
        remedy = "lower the learning rate, use trainer.precision=32-true or trainer.gradient_clip_val=1"
        if any(getattr(callback, "best_model_path", "") for callback in self.trainer.checkpoint_callbacks):
            return f"The last good checkpoint is kept: {remedy}, and resume with ckpt_path=last resume=force"
        return f"It has no checkpoint yet: {remedy}, and start again"

    def _write(self, step: Step, names: list[Any], capture: Capture) -> str:
        image, target = step.batch[:2]
        teacher = None
        if self.teacher is not None and self.criterion.needs:
            with torch.no_grad():
                teacher = self.teacher(image, self.criterion.needs)
        content = {
            "epoch": self.current_epoch,
            "step": self.global_step,
            "precision": str(self.trainer.precision),
            "names": names,
            "batch": [image, target],
            "values": step.values,
            "random": step.random,
            "factors": self.criterion.factors,
            "teacher": teacher,
            "weights": self.state_dict(),
            "mean": self.student.mean,
            "std": self.student.std,
        }
        try:
            path = capture.write(content, self.global_rank)
        except UserError as error:  # a full disk
            return f". The step is not kept: {error}"
        return f". The step is kept: python -m transkd.replay {path}"

    def on_after_backward(self) -> None:
        """Check the loss, and copy gradients when accumulating: a CUDA graph would overwrite them.

        The check waits here, and not in the step, so that the device computes the backward pass meanwhile.
        """
        self._stop_if_not_finite()
        if self.compiled and self.trainer.accumulate_grad_batches > 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()

    def on_fit_start(self) -> None:
        """Check before the first step that every schedule turns on in a run of this length."""
        if self.criterion.schedules:
            end = self._progress()
            self.criterion.check_schedules(end.steps, end.epochs)

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule for the student's and the terms' parameters."""
        assert self.optimization is not None, "a Distiller without an optimization cannot be fitted"
        made = self.optimization.configure([p for p in self.parameters() if p.requires_grad], self.trainer)
        self.configured = groups_of(made)
        return made

    def on_train_start(self) -> None:
        """Let a resumed run follow its own schedule: it may be longer than that of the checkpoint."""
        schedules = [found.scheduler for found in self.trainer.lr_scheduler_configs]
        follow_schedule(self.trainer.optimizers[0], schedules[0] if schedules else None, self.configured)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Convert to the dtype of the training first, as Lightning loads weights before; float64 would be rounded."""
        self.trainer.precision_plugin.convert_module(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the student's description; raise an error instead of overwriting a good checkpoint with NaN weights."""
        broken = next((name for name, p in self.named_parameters() if not p.isfinite().all()), None)
        if broken is not None:
            raise UserError(
                f"{broken} is not finite at epoch {self.current_epoch}: this checkpoint was not written, the last "
                "good one is kept. Lower the learning rate or clip gradients (trainer.gradient_clip_val=1)"
            )
        checkpoint[CARD] = describe(self.student, **self.notes)

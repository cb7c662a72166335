"""A student that starts where its teacher is: its first weights, before any step of training."""

from transkd.models.inherit.copying import start_from_teacher
from transkd.models.inherit.methods import inherit
from transkd.models.inherit.report import InheritReport

__all__ = ["InheritReport", "inherit", "start_from_teacher"]

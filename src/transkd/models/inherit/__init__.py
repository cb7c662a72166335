"""Initialisation of a student from its teacher, before any training step."""

from transkd.models.inherit.copying import start_from_teacher
from transkd.models.inherit.methods import inherit
from transkd.models.inherit.report import InheritReport

__all__ = ["InheritReport", "inherit", "start_from_teacher"]

"""``start_from_teacher`` under the name that it had before ``transkd.models.inherit``."""

from transkd.models.inherit.copying import start_from_teacher

__all__ = ["start_from_teacher"]

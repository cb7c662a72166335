"""Exception for errors that a user can fix."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Invalid input; the message states what was expected, what was given and how to fix it.

    The commands print only the message and exit with status 1; in Python it is a ``ValueError``.
    """

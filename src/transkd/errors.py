"""The one exception for what a user can mend."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Bad input: the message says what was expected, what came and what would mend it.

    The commands print the message alone and exit with status 1; from Python it is an ordinary ``ValueError``.
    """

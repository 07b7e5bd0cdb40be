"""The errors that a user can cause, each with one message that says how to mend it."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input found before work was lost.

    The message names the value, what was got, what was expected and how to mend it. The command line prints it
    alone, without a traceback.
    """


def user_error(name: str, got: object, expected: str, fix: str) -> UserError:
    """Builds a `UserError` in the project's one form.

    Args:
        name: The parameter, field or file that is wrong.
        got: The value that was given.
        expected: What would have been right, in words.
        fix: What the user can do about it.

    Returns:
        The error, to be raised by the caller.
    """
    return UserError(f"{name}: got {got!r}, expected {expected}. {fix}")

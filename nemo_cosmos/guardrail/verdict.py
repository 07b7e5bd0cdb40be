"""Verdicts: what they mean together, and what becomes of a guard that breaks."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from nemo_cosmos.contracts import Verdict
from nemo_cosmos.errors import UserError


def is_safe(verdicts: Sequence[Verdict]) -> bool:
    """Whether every guard said safe; no verdict at all is not safe."""
    return bool(verdicts) and all(verdict.safe for verdict in verdicts)


def failed_verdict(guard: str, error: Exception) -> Verdict:
    """The verdict in place of a guard that raised: unsafe, with the error as the reason."""
    return Verdict(guard=guard, safe=False, reason=f"the guard itself failed: {type(error).__name__}: {error}")


def guard_package(module: str, package: str, *, by_hand: str | None = None) -> ModuleType:
    """Imports what a guard needs.

    Args:
        module: What to import.
        package: The distribution that holds it.
        by_hand: The command that installs it where the `guard` extra cannot.

    Raises:
        UserError: It is not installed; a missing guard is never skipped.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = "`pip install nemo-cosmos[guard]`" + (f" and `{by_hand}`" if by_hand else "")
        raise UserError(
            f"guard: package {package} cannot be imported ({error}). Run {install}, or leave this guard out."
        ) from error

"""`nemo cosmos NAME --help` with the arguments of the step, which nemo-run cannot read off our entry points.

An entry point's own signature names types that are imported for type checkers only, or none at all, since nothing may
be imported before a step is called. Here the recipe is made, which imports the step, and the step's signature is shown.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import fiddle
import nemo_run as run
from nemo_run.cli.api import Entrypoint
from rich.console import Console
from rich.markup import escape


class CosmosEntrypoint(Entrypoint):
    """An entry point whose help lists what its recipes configure."""

    recipes: tuple[Callable[..., run.Partial], ...] = ()
    """What it may run; all run the same step."""

    def help(self, console: Console | None = None, with_docs: bool = True) -> None:
        """Prints recipes, arguments and executors."""

        @functools.wraps(self.fn)  # nemo-run finds the recipes by the entry point's name
        def described() -> None: ...

        described.__signature__ = readable_signature(fiddle.get_callable(self.recipes[0]()))  # type: ignore[attr-defined]
        run.help(described, console=console, with_docs=with_docs)


def readable_signature(step: Callable) -> inspect.Signature:
    """A function's signature with annotations that nemo-run prints as they stand."""
    signature = inspect.signature(step)
    shown = [p.replace(annotation=_Shown(readable(p.annotation))) for p in signature.parameters.values()]
    return signature.replace(parameters=shown)


class _Shown:
    """Stands where nemo-run expects a type; anything that is none it prints by `str`, as rich markup."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return escape(self._text)


def readable(annotation: Any) -> str:  # noqa: ANN401 - a typing form
    """Writes a type as one would in Python, without modules."""
    if annotation is inspect.Parameter.empty:
        return ""
    if annotation is type(None):
        return "None"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(readable(argument) for argument in arguments)
    if origin is typing.Literal:
        return " | ".join(repr(argument) for argument in arguments)
    if origin is not None:
        inside = ", ".join("..." if argument is ... else readable(argument) for argument in arguments)
        return f"{origin.__name__}[{inside}]"
    return getattr(annotation, "__name__", str(annotation))

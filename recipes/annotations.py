"""Makes command-line overrides work for functions of modules with `from __future__ import annotations`.

nemo-run parses an override such as `trainer.max_steps=5` by the type that the target's signature gives, and knows
neither annotations that are still text nor `X | None` and `tuple[...]`. Here the targets of a recipe get their
annotations evaluated, once, into types that nemo-run parses.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

import fiddle
from fiddle import daglish

P = typing.ParamSpec("P")


def with_types(recipe: Callable[P, fiddle.Buildable]) -> Callable[P, fiddle.Buildable]:
    """Decorates a recipe: its arguments and all that it configures can be set on the command line."""
    _evaluate(recipe)

    @functools.wraps(recipe)
    def made(*args: P.args, **kwargs: P.kwargs) -> fiddle.Buildable:
        configuration = recipe(*args, **kwargs)
        evaluate_annotations(configuration)
        return configuration

    return made


def evaluate_annotations(recipe: fiddle.Buildable) -> None:
    """Evaluates the annotations of every function and class that `recipe` configures."""
    for value, _ in daglish.iterate(recipe):
        if isinstance(value, fiddle.Buildable):
            _evaluate(fiddle.get_callable(value))


def _evaluate(target: Callable) -> None:
    function = target.__init__ if inspect.isclass(target) else target
    annotations = getattr(function, "__annotations__", {})
    if not any(isinstance(annotation, str) for annotation in annotations.values()):
        return
    owners = inspect.getmro(target) if inspect.isclass(target) else (target,)
    scopes = [vars(sys.modules[owner.__module__]) for owner in owners]
    for name, annotation in list(annotations.items()):
        if isinstance(annotation, str):
            annotations[name] = _evaluate_one(annotation, scopes)


def _evaluate_one(annotation: str, scopes: list[dict[str, Any]]) -> Any:  # noqa: ANN401 - a typing form
    for scope in scopes:
        try:
            return _as_nemo_run_parses(eval(annotation, dict(scope)))  # noqa: S307 - our own source text
        except NameError:  # imported under TYPE_CHECKING only, or a base class's name
            continue
    return annotation


def _as_nemo_run_parses(annotation: Any) -> Any:  # noqa: ANN401 - a typing form
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return typing.Union[tuple(_as_nemo_run_parses(arg) for arg in typing.get_args(annotation))]  # noqa: UP007
    return Any if origin is tuple or annotation is tuple else annotation

"""Running a recipe in this process."""

from __future__ import annotations

import logging
import re
import types
import typing
from typing import Any

from nemo_cosmos.errors import UserError, user_error
from recipes.registry import find


def configure(name: str, overrides: list[str]) -> Any:  # noqa: ANN401 - a nemo-run Partial
    """Returns a recipe's configuration with command-line overrides.

    Args:
        name: As in `recipes.registry`.
        overrides: Such as `trainer.max_steps=100`.

    Raises:
        UserError: There is no such recipe, or an override names nothing or does not parse.
    """
    from nemo_run.cli.cli_parser import CLIException, parse_cli_args

    configuration = find(name)()
    logger = logging.getLogger("nemo_run.cli.cli_parser")  # would tell an error at length that is told below
    for override in overrides:
        logger.disabled = True
        try:
            configuration = parse_cli_args(configuration, [override])
        except (CLIException, AttributeError, TypeError) as error:
            raise _refused(override, error) from error
        finally:
            logger.disabled = False
    return configuration


def run_here(name: str, overrides: list[str]) -> Any:  # noqa: ANN401 - whatever the recipe's function returns
    """Runs a recipe in this process.

    Args:
        name: As in `recipes.registry`.
        overrides: Such as `trainer.max_steps=100`.

    Returns:
        What the recipe's function returns: for a training, the run's folder.

    Raises:
        UserError: See `configure`; and whatever input the step refuses.
    """
    import fiddle

    return fiddle.build(configure(name, overrides))()


def _refused(override: str, error: Exception) -> UserError:
    """One line of what nemo-run wraps into several errors around each other."""
    from nemo_run.cli.cli_parser import ParseError

    key, equals, _ = override.partition("=")
    expected = "`name=value` with a name that `nemo-cosmos recipes show` lists"
    if not equals:
        return user_error("override", override, expected, "Write a value behind its name.")
    innermost: ParseError | None = None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ParseError) and not isinstance(cause.expected_type, str):
            innermost = cause
        cause = cause.__cause__ or cause.__context__
    if innermost is not None:
        wanted = _spelled(innermost.expected_type)
        if innermost.expected_type is typing.Literal:  # of a choice that is not optional it tells the values in words
            wanted = re.findall(r"one of \(.*?\)", str(innermost))[0]
        return user_error(f"override {key}", innermost.value, wanted, "Correct the value.")
    told = re.sub(r" for <.*", "", str(error).splitlines()[0])
    return user_error("override", override, expected, f"nemo-run says: {told}")


def _spelled(hint: Any) -> str:  # noqa: ANN401 - a type, or what stands for one in annotations
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_spelled, arguments))
    if hint is types.NoneType:
        return "None"
    return getattr(hint, "__name__", str(hint)) if origin is None else str(hint)

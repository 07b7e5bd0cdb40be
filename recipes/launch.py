"""Running a recipe in this process."""

from __future__ import annotations

from typing import Any

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

    from nemo_cosmos.errors import user_error

    configuration = find(name)()
    for override in overrides:
        try:
            configuration = parse_cli_args(configuration, [override])
        except (CLIException, AttributeError, TypeError) as error:
            expected = "`name=value` with a name that `nemo-cosmos recipes show` lists"
            raise user_error("override", override, expected, f"nemo-run says: {_first_line(error)}") from error
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


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

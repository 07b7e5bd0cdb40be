"""Entry point: puts the subcommands together and turns user errors into one line."""

from __future__ import annotations

import sys

import typer

from nemo_cosmos import __version__
from nemo_cosmos.cli import curation, inspection, model, quickstart
from nemo_cosmos.errors import UserError

app = typer.Typer(
    name="nemo-cosmos",
    help="World foundation models on NVIDIA NeMo: from raw video to generated, guarded, measured video.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show it."),
) -> None:
    pass


for group in (quickstart, curation, model, inspection):
    group.add_to(app)


_FIDDLE_NOTE = "\n\nFiddle context:"


def main() -> None:
    """Runs the command line; a `UserError` prints its message alone and exits with status 2."""
    try:
        app()
    except UserError as error:
        # Fiddle adds where in a recipe's configuration it happened, which tells a user of the command line nothing.
        print(f"nemo-cosmos: error: {str(error).partition(_FIDDLE_NOTE)[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

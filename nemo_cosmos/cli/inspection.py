"""recipes, doctor: what is there."""

from __future__ import annotations

from typing import Annotated

import typer

from nemo_cosmos.cli.output import Json, show

_recipes = typer.Typer(name="recipes", help="The nemo-run recipes of this collection.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Adds this file's commands."""
    app.add_typer(_recipes)
    app.command()(doctor)


@_recipes.command("list")
def list_recipes(as_json: Json = False) -> None:
    """Names and one line each."""
    from recipes.registry import describe

    show(describe(), as_json=as_json)


@_recipes.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A recipe's name.")]) -> None:
    """The whole configuration of a recipe."""
    from recipes.registry import as_yaml

    typer.echo(as_yaml(name))


def doctor(as_json: Json = False) -> None:
    """What is installed, which device, what will and won't run, and why."""
    from nemo_cosmos.doctor import diagnose

    show({item.name: item.describe() for item in diagnose()}, as_json=as_json)

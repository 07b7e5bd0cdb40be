"""How commands print what they made."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def show(result: dict[str, Any], *, as_json: bool) -> None:
    """Prints a result as JSON, or as aligned names and values.

    Args:
        result: Names and values; nested values are printed as JSON.
        as_json: Whether a script reads it.
    """
    if as_json:
        typer.echo(json.dumps(result, default=str))
        return
    width = max(len(name) for name in result) if result else 0
    for name, value in result.items():
        text = f"{value:.4g}" if isinstance(value, float) else value
        text = json.dumps(text, default=str) if isinstance(text, dict | list | tuple) else text
        typer.echo(f"{name:<{width}}  {text}")

"""Small weights that come with the package: one safetensors file and one card each."""

from __future__ import annotations

from pathlib import Path

from nemo_cosmos.errors import UserError

WEIGHTS = Path(__file__).parents[1] / "weights"
"""Where they stand."""


def embedded_names() -> list[str]:
    """Names of all embedded weights."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def embedded_path(name: str) -> Path:
    """The safetensors file of embedded weights.

    Raises:
        UserError: There are none of that name.
    """
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(
            f"checkpoint {name}: neither a folder nor embedded weights; those are {embedded_names()}. Check the name."
        )
    return path

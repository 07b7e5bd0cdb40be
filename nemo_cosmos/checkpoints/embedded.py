"""Small weights that come with the package: one safetensors file and one card each."""

from __future__ import annotations

from pathlib import Path

from nemo_cosmos.errors import UserError
from nemo_cosmos.weight_files.hub import local_path

WEIGHTS = Path(__file__).parents[1] / "weights"
"""Where they stand."""

NAMES = (
    "autoregressive_tiny_action",
    "diffusion_tiny_action",
    "diffusion_tiny_text2world",
    "tokenizer_tiny",
    "tokenizer_tiny_discrete",
)
"""What a whole installation has."""


def embedded_names() -> list[str]:
    """Names of the embedded weights that are there."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def find_checkpoint(source: str | Path) -> Path:
    """Path of a checkpoint, of whatever format.

    Args:
        source: A path, an address on the hub as `nemo_cosmos.weight_files.hub` has them, or the name of embedded
            weights.

    Raises:
        UserError: There is none, or it cannot be fetched.
    """
    path = local_path(source)
    return path if path.exists() else embedded_path(str(source))


def embedded_path(name: str) -> Path:
    """The safetensors file of embedded weights.

    Raises:
        UserError: There are none of that name, or they are missing.
    """
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file() and name in NAMES:
        raise UserError(
            f"checkpoint {name}: its embedded weights are missing, expected at {path}. Install the package anew, or "
            "name another checkpoint."
        )
    if not path.is_file():
        raise UserError(
            f"checkpoint {name}: neither a folder nor embedded weights; those are {embedded_names()}. "
            "Check the name, or give an address, hf://OWNER/NAME."
        )
    return path

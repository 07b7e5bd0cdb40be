"""Reading the YAML files of `conf/`: values that recipes take up when they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_cosmos.errors import UserError

_ROOT = Path(__file__).resolve().parents[1]
CONF_FOLDERS = (_ROOT / "conf", _ROOT / "nemo_cosmos" / "conf")
"""In a checkout, and where a wheel puts it."""


def conf_file(name: str) -> Path:
    """Returns the path of a file in `conf/`.

    Raises:
        UserError: The installation lacks it.
    """
    for folder in CONF_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"conf/{name}: not in this installation. Install nemo-cosmos again.")


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns a YAML file's values with OmegaConf's references resolved.

    Raises:
        UserError: The file is missing, is not YAML, or is no mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read as YAML ({error}). Correct the file or give another.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not `name: value` lines. Correct the file.")
    return {str(name): value for name, value in values.items()}

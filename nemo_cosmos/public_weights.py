"""Public weights of torchvision's networks, in torch hub's cache."""

from __future__ import annotations

import os
import shutil
import urllib.request
from pathlib import Path

from nemo_cosmos.errors import UserError
from nemo_cosmos.files import sha256_of, written_aside

_TIMEOUT_S = 10.0
"""Without answer for so long, a host counts as out of reach."""


def public_weights(url: str) -> Path:
    """Finds a file of weights in torch hub's cache, or fetches it there once.

    With `HF_HUB_OFFLINE=1` nothing is fetched.

    Args:
        url: Where it is published; the name's end tells the start of its SHA-256, as in `vgg16-397923af.pth`.

    Returns:
        The file.

    Raises:
        UserError: It cannot be fetched, or is not what its name says.
    """
    # Imported here: reading a cache's place needs no more of torch, and curation never comes here.
    from torch.hub import get_dir

    path = Path(get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        _fetch(url, path)
    wanted = path.stem.rsplit("-", 1)[-1]
    if not sha256_of(path).startswith(wanted):
        raise UserError(f"{path}: its SHA-256 does not start with {wanted}. Delete it and run again.")
    return path


def _fetch(url: str, path: Path) -> None:
    mend = f"Fetch {url} elsewhere and put it at {path}."
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"{path}: not there, and HF_HUB_OFFLINE forbids to fetch it. {mend}")
    try:
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_S) as source,
            written_aside(path) as aside,
            aside.open("wb") as file,
        ):
            shutil.copyfileobj(source, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be fetched ({error}). {mend}") from error

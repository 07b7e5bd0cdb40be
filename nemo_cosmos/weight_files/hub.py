"""Checkpoints on the Hugging Face hub: `hf://OWNER/NAME[@REVISION][/PATH]`.

They are kept in huggingface_hub's own cache, so an interrupted download goes on where it stopped, and nothing is
fetched twice. `HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_HOME` and `HF_ENDPOINT` are respected.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import sha256_of

_ADDRESS = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.+))?")
_NOT_WEIGHTS = ("guardrail/*", "nemo/*", "*.md", "*.mp4", "*.gif", "*.png", "*.jpg")
"""What stands in published repositories besides one model."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def local_path(source: str | Path) -> Path:
    """Path of what is named by a path or by an address on the hub, which is fetched.

    Raises:
        UserError: As `fetch`; a path need not exist.
    """
    return fetch(source) if isinstance(source, str) and is_address(source) else Path(source)


def is_address(source: str) -> bool:
    """Tells whether a checkpoint is named by an address on the hub."""
    return source.startswith("hf://")


@functools.cache  # a process sees one commit, and compares its files once
def fetch(address: str) -> Path:
    """Finds a checkpoint in the local cache, or downloads it there.

    Args:
        address: `hf://OWNER/NAME` for a repository's newest weights, with `@REVISION` (a commit, branch or tag) those
            of that time, and with `/PATH` one folder of it, or one file with its card beside it, such as
            `hf://nvidia/Cosmos-Predict1-7B-Text2World/model.pt`.

    Returns:
        The file or folder; its path holds the commit.

    Raises:
        UserError: The address is malformed, there is no such thing, it may not be read without a token, it cannot be
            reached, or a file is not what the hub says.
    """
    match = _ADDRESS.fullmatch(address.rstrip("/"))
    if match is None:
        raise user_error("address", address, "hf://OWNER/NAME[@REVISION][/PATH]", "Correct it.")
    path = match["path"]
    patterns = {"ignore_patterns": list(_NOT_WEIGHTS)} if path is None else {"allow_patterns": _at(path)}
    try:
        folder = Path(snapshot_download(match["repo"], revision=match["revision"], **patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{address}: {_explained(error)}") from error
    place = folder / path if path else folder
    if not place.exists():
        raise UserError(
            f"{address}: the repository has no {path}, or the cache has none while offline. Correct the path."
        )
    for file in [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file()):
        _check(file)
    return place


def _at(path: str) -> list[str]:
    return [path, f"{path}/*", str(PurePosixPath(path).with_suffix(".json"))]


def _explained(error: Exception) -> str:
    # The order matters: each is also of the kinds below it.
    if isinstance(error, GatedRepoError):
        return "must be asked for. Accept its licence on the hub, then log in (hf auth login, or HF_TOKEN)."
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one. Check the name, or log in (hf auth login, or HF_TOKEN)."
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision. Give a commit, branch or tag that it has."
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "is not in the cache and cannot be fetched: the hub is out of reach, or HF_HUB_OFFLINE forbids it. Run "
            "again with a connection and without HF_HUB_OFFLINE; what has been fetched stays."
        )
    if isinstance(error, EntryNotFoundError):
        return f"the repository lacks a file that it lists ({error}). Try again, or another revision."
    if isinstance(error, HFValidationError):
        return f"is no name of a repository ({error}). Correct it."
    return f"the download broke off ({error}). Run again; it goes on from here."


def _check(file: Path) -> None:
    """Compares a large file with the hub's hash, by which huggingface_hub names what it downloads."""
    told = file.resolve().name
    if _SHA256.fullmatch(told) and sha256_of(file) != told:
        raise UserError(f"{file}: its SHA-256 is not {told}, as the hub says. Delete {file.resolve()} and run again.")

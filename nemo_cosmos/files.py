"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_cosmos.errors import UserError, user_error

_FULL_BYTES = 1 << 20
"""Less than this is a full disk: what failed to write may have left a little."""


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it into place when the block ends well.

    Works for a file and for a folder. An existing `path` stays untouched until the rename; when the block raises,
    the temporary is removed. A kill between the two renames that replace a folder leaves both the old and the new one
    beside `path`, under hidden names.

    Args:
        path: Where the finished file or folder shall stand.

    Yields:
        The temporary path to write to; it keeps the final suffix, since encoders choose a format by it.

    Raises:
        UserError: The disk is full or the folder is read-only.
    """
    path = Path(path)
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        if aside.is_dir() and path.is_dir():
            _replace_folder(path, aside)
        else:
            os.replace(aside, path)
    except Exception as error:
        if (explained := _explained(error, path)) is None:
            raise
        raise explained from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def _replace_folder(path: Path, new: Path) -> None:
    """Moves the old folder aside before it is deleted, so that a kill leaves one of the two whole."""
    old = new.with_name(f".old{new.name}")
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> Path:  # noqa: ANN401 - any JSON value
    """Writes `value` as indented JSON, aside and renamed."""
    path = Path(path)
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    return path


def read_json(path: str | Path) -> Any:  # noqa: ANN401 - any JSON value
    """Reads a JSON file.

    Raises:
        UserError: The file is missing or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Run the step that writes it, or give another path.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}). Delete it and run the step that writes it again."
        ) from error


def sha256_of(path: str | Path) -> str:
    """Returns the hex SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _explained(error: Exception, path: Path) -> UserError | None:
    if isinstance(error, UserError):
        return None
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EROFS):
        return UserError(f"{path}: cannot write here ({os.strerror(number)}). Choose another output folder.")
    # numpy, safetensors and torch hide the number: they tell of a short write in words of their own.
    if number in (errno.ENOSPC, errno.EDQUOT) or (number is None and _is_full(path.parent)):
        return user_error(
            str(path),
            str(error) if number is None else os.strerror(number),
            "free space to write it",
            "The disk is full. Free some space and run again; it goes on from here.",
        )
    return None


def _is_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < _FULL_BYTES

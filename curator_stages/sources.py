"""Where videos come from: a folder, a glob, a manifest or webdataset tars, on disk or at any address fsspec knows."""

from __future__ import annotations

import itertools
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.video_io import VIDEO_SUFFIXES

MANIFEST_SUFFIXES = (".parquet", ".csv", ".jsonl")
DESCRIBING_COLUMNS = ("source", "rollout", "split", "caption", "licence")
"""Columns of a manifest, and fields of a tar's JSON, that describe a video."""
LENGTH_COLUMNS = ("fps", "num_frames")
"""Columns of a manifest that tell what a video must else be opened for."""

_MAX_TEXT_BYTES = 64 << 20
"""Of a text or JSON beside a video in a tar: an hour of camera poses takes less."""
_PATH_COLUMN = "path"
_EXPECTED = "a folder, a glob, a .tar, or a manifest (.parquet, .csv, .jsonl), on disk or as an fsspec address"


@dataclass(frozen=True, kw_only=True)
class SourceVideo:
    """A video that was found, not opened yet."""

    path: str
    """Absolute path, or an address such as `s3://bucket/a.mp4` or `tar://a.mp4::file:///data/shard.tar`."""
    name: str
    """Its stable name: the path below what was searched, with forward slashes."""
    state: list[str | int]
    """Tells this state of the file from any other one."""
    source: str
    """Domain: the first folder below what was searched, or `user`."""
    sidecar: str | None = None
    """Text of the JSON beside it."""
    sidecar_name: str = ""
    described: dict[str, str] = field(default_factory=dict)
    """What a manifest's row says, some of `DESCRIBING_COLUMNS` and `LENGTH_COLUMNS`; in a tar, the text and JSON beside
    it."""
    error: str | None = None
    """Why it cannot be read."""


def find_videos(
    where: str | Path, *, leave_out: str | Path | None = None, passed_over: Counter[str] | None = None
) -> list[SourceVideo]:
    """Lists all videos, in the order of their names.

    Args:
        where: A folder (searched recursively, through links too), a glob (`*`, `**`, `?`, `[...]`), webdataset tars
            (`*` and `{000..127}` allowed), or a manifest with the column `path` (absolute, an address, or relative to
            the manifest), any of `DESCRIBING_COLUMNS`, and `LENGTH_COLUMNS` where they are known. Without a protocol
            such as `s3://` it is on this machine.
        leave_out: A folder on this machine whose files are none of the input.
        passed_over: Is told of files of a folder or glob that are neither videos by their suffix nor sidecars: how many
            there are of each suffix, hidden files left out.

    Returns:
        The videos, hidden files left out; a folder or file that cannot be read is among them, with `error`.

    Raises:
        UserError: Nothing is there, it holds no video, a manifest is wrong, or a package for the protocol is missing.
    """
    where = str(where)
    files, root = _file_system(where)
    suffix = posixpath.splitext(root)[1].lower()
    try:
        if suffix in MANIFEST_SUFFIXES:
            found = list(_in_manifest(files, root))
        elif suffix == ".tar":
            found = [video for tar in _matches(files, root) for video in _in_tar(files, tar, _fixed_part(root))]
        elif _is_pattern(root):
            found = list(_in_pattern(files, root, passed_over))
        elif files.isdir(root):
            found = list(_in_folder(files, root, leave_out, passed_over))
        else:
            raise user_error("input folder", where, "an existing folder with videos", "Check the path.")
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({said_by(error)}). Give {_EXPECTED}.") from error
    if not found:
        kinds = ", ".join(f"*{suffix}" for suffix in sorted(VIDEO_SUFFIXES))
        raise user_error("input folder", where, f"at least one of {kinds}", "Put videos there.")
    found.sort(key=lambda video: video.name)
    for one, other in itertools.pairwise(found):
        if one.name == other.name:  # which names the clips
            paths = sorted({one.path, other.path})
            raise user_error(where, f"{one.name} twice ({', '.join(paths)})", "every video once", "Remove one of them.")
    return found


def absolute(where: str | Path) -> str:
    """Makes a path independent of the working folder; addresses stay as they are."""
    return str(where) if is_address(str(where)) else str(Path(where).resolve())


def is_address(path: str) -> bool:
    """Tells an fsspec address from a path on this machine."""
    return "://" in path


def _file_system(where: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        files, root = fsspec.core.url_to_fs(where if is_address(where) else str(Path(where).resolve()))
    except (ImportError, ValueError) as error:
        raise UserError(f"{where}: cannot be reached ({error}). Install the package that it names.") from error
    return files, root.rstrip("/")


def _address(files: fsspec.AbstractFileSystem, path: str) -> str:
    return path if isinstance(files, LocalFileSystem) else files.unstrip_protocol(path)


def _is_pattern(path: str) -> bool:
    return any(letter in path for letter in "*?[{")


def _fixed_part(pattern: str) -> str:
    """Returns the folder of a pattern that has no wildcard in it."""
    parts = posixpath.dirname(pattern).split("/")
    fixed = next((i for i, part in enumerate(parts) if _is_pattern(part)), len(parts))
    return "/".join(parts[:fixed])


def _matches(files: fsspec.AbstractFileSystem, pattern: str) -> list[str]:
    from braceexpand import braceexpand

    patterns = list(braceexpand(pattern))
    return [path for p in patterns for path in (files.glob(p) if _is_pattern(p) else [files._strip_protocol(p)])]


def _in_pattern(
    files: fsspec.AbstractFileSystem, pattern: str, passed_over: Counter[str] | None
) -> Iterator[SourceVideo]:
    videos = [path for path in _matches(files, pattern) if not files.isdir(path)]
    sidecars = [json for path in videos if files.isfile(json := posixpath.splitext(path)[0] + ".json")]
    yield from _among(files, sorted({*videos, *sidecars}), _fixed_part(pattern), passed_over)


def _below(path: str, root: str) -> str:
    """Returns `path` relative to `root` where it lies inside, else without its leading slash."""
    return path.removeprefix(root.rstrip("/") + "/").lstrip("/") if root else path.lstrip("/")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _is_wanted(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in VIDEO_SUFFIXES and not _is_hidden(name)


def _in_folder(
    files: fsspec.AbstractFileSystem, root: str, leave_out: str | Path | None, passed_over: Counter[str] | None
) -> Iterator[SourceVideo]:
    left_out = None if leave_out is None or is_address(str(leave_out)) else str(Path(leave_out).resolve())
    local = isinstance(files, LocalFileSystem)
    paths, folders, seen = [], [root], {left_out}
    links: list[str] = []
    # `walk` of fsspec tells only of the topmost folder that it cannot be read, and follows no links.
    while folders or links:
        if not folders:  # links come last, in order, so that what they lead back to keeps its own name
            links.sort()
            folders.append(links.pop(0))
        folder = folders.pop()
        real = os.path.realpath(folder) if local else folder
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = files.ls(folder, detail=True)
        except OSError as error:
            if folder == root:
                raise
            reason = f"the folder cannot be read ({said_by(error)})"
            yield _unreadable(_address(files, folder), f"{_below(folder, root)}/", reason)
            continue
        for entry in entries:
            path = entry["name"].rstrip("/")
            if entry["type"] == "directory":
                folders.append(path)
            elif entry.get("islink") and files.isdir(path):
                links.append(path)
            else:
                paths.append(path)
    yield from _among(files, paths, root, passed_over)


def _among(
    files: fsspec.AbstractFileSystem, paths: list[str], root: str, passed_over: Counter[str] | None
) -> Iterator[SourceVideo]:
    """Turns those of the files that are videos into records; JSON of the same stem is the sidecar."""
    there = set(paths)
    wanted = [path for path in paths if _is_wanted(_below(path, root))]
    sidecars = {posixpath.splitext(path)[0] + ".json" for path in wanted} & there
    for path in wanted:
        sidecar = posixpath.splitext(path)[0] + ".json"
        yield _found(files, path, _below(path, root), sidecar if sidecar in sidecars else None)
    if passed_over is not None:
        others = there - sidecars - set(wanted)
        names = [name for name in (_below(path, root) for path in others) if not _is_hidden(name)]
        passed_over.update(posixpath.splitext(name)[1] or "no suffix" for name in names)


def _found(
    files: fsspec.AbstractFileSystem, path: str, name: str, sidecar: str | None, described: dict[str, str] | None = None
) -> SourceVideo:
    try:
        info = files.info(path)
        if info["type"] != "file":
            return _unreadable(_address(files, path), name, f"is no file ({info['type']})")
        if info["size"] == 0:
            return _unreadable(_address(files, path), name, "the file is empty (0 bytes)")
        text = None if sidecar is None else files.read_text(sidecar)
    except (OSError, UnicodeDecodeError) as error:
        return _unreadable(_address(files, path), name, f"cannot be read ({said_by(error)})")
    return SourceVideo(
        path=_address(files, path),
        name=name,
        state=_state(files, path, info),
        source=name.split("/")[0] if "/" in name else "user",
        sidecar=text,
        sidecar_name="" if sidecar is None else posixpath.basename(sidecar),
        described=described or {},
    )


def said_by(error: Exception) -> str:
    """Returns the system's or FFmpeg's words without the path, which differs from machine to machine."""
    return getattr(error, "strerror", None) or str(error)


def _unreadable(path: str, name: str, reason: str) -> SourceVideo:
    source = name.split("/")[0] if "/" in name.rstrip("/") else "user"
    return SourceVideo(path=path, name=name, state=[reason], source=source, error=reason)


def _state(files: fsspec.AbstractFileSystem, path: str, info: dict[str, Any]) -> list[str | int]:
    if isinstance(files, LocalFileSystem):
        return [info["size"], Path(path).stat().st_mtime_ns]
    return [info.get("size") or 0, files.ukey(path)]


def _in_manifest(files: fsspec.AbstractFileSystem, path: str) -> Iterator[SourceVideo]:
    rows = _rows(files, path)
    if rows and isinstance(rows[0], dict) and _PATH_COLUMN not in rows[0]:
        raise user_error(path, sorted(rows[0]), f"a column `{_PATH_COLUMN}`", "Name the column of the videos so.")
    folder = posixpath.dirname(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or row.get(_PATH_COLUMN) in (None, ""):
            raise user_error(f"{path}, row {number}", row, f"a value for `{_PATH_COLUMN}`", "Mend or remove the row.")
        told = str(row[_PATH_COLUMN])
        target = (
            told
            if is_address(told) or told.startswith("/")
            else _address(files, posixpath.normpath(posixpath.join(folder, told)))
        )
        holder, stripped = _file_system(target) if is_address(target) else (files, files._strip_protocol(target))
        columns = (*DESCRIBING_COLUMNS, *LENGTH_COLUMNS)
        described = {key: str(row[key]) for key in columns if row.get(key) not in (None, "")}
        yield _found(holder, stripped, _below(stripped, folder), None, described)


def _rows(files: fsspec.AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        with files.open(path, "rb") as file:
            suffix = posixpath.splitext(path)[1].lower()
            if suffix == ".jsonl":
                return [json.loads(line) for line in file.read().decode().splitlines() if line.strip()]
            if suffix == ".parquet":
                return parquet.read_table(file).to_pylist()
            # As they stand: a rollout called 0012 is not the number 12.
            columns = (_PATH_COLUMN, *DESCRIBING_COLUMNS, *LENGTH_COLUMNS)
            texts = csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()))
            return csv.read_csv(file, convert_options=texts).to_pylist()
    except (pa.ArrowInvalid, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a manifest ({error}). Write it again.") from error


def _in_tar(files: fsspec.AbstractFileSystem, tar: str, root: str) -> Iterator[SourceVideo]:
    """Lists a webdataset shard's videos; `.json` and `.txt` (a caption) of the same key describe them."""
    import tarfile

    state = _state(files, tar, files.info(tar))
    shard = _below(tar, root).removesuffix(".tar")
    try:
        with files.open(tar, "rb") as file, tarfile.open(fileobj=file) as archive:
            members = {member.name: member for member in archive if member.isfile()}
            keys = {posixpath.splitext(name)[0] for name in members if _is_wanted(name)}
            beside = {f"{key}{suffix}": key for key in keys for suffix in (".json", ".txt")}
            too_large = {beside[name]: name for name in beside.keys() & members if members[name].size > _MAX_TEXT_BYTES}
            texts = {
                name: archive.extractfile(member).read().decode()  # type: ignore[union-attr]
                for name, member in members.items()
                if name in beside and name not in too_large.values()
            }
    except (tarfile.TarError, UnicodeDecodeError) as error:
        yield _unreadable(_address(files, tar), f"{shard}.tar", f"cannot be read as a tar ({error})")
        return
    container = _address(files, tar) if is_address(_address(files, tar)) else f"file://{tar}"
    for name in filter(_is_wanted, members):
        key = posixpath.splitext(name)[0]
        if key in too_large:
            reason = f"its {too_large[key]} has {members[too_large[key]].size:,} bytes, over {_MAX_TEXT_BYTES:,}"
            yield _unreadable(f"tar://{name}::{container}", f"{shard}/{name}", reason)
            continue
        told = texts.get(f"{key}.json")
        whole = told is not None and _is_whole_sidecar(told)
        yield SourceVideo(
            path=f"tar://{name}::{container}",
            name=f"{shard}/{name}",
            state=[*state, name],
            source=shard.split("/")[0] if "/" in shard else "user",
            sidecar=told if whole else None,
            sidecar_name=f"{key}.json" if whole else "",
            described=_described_in_tar(None if whole else told, texts.get(f"{key}.txt")),
        )


def _is_whole_sidecar(text: str) -> bool:
    """Tells a `RawVideo` record from metadata of another origin."""
    try:
        values = json.loads(text)
    except ValueError:
        return False
    return isinstance(values, dict) and {"source", "rollout", "fps", "num_frames", "split"} <= set(values)


def _described_in_tar(metadata: str | None, caption: str | None) -> dict[str, str]:
    try:
        values = json.loads(metadata) if metadata else {}
    except ValueError:
        values = {}
    told = values if isinstance(values, dict) else {}
    described = {key: str(told[key]) for key in DESCRIBING_COLUMNS if told.get(key) not in (None, "")}
    return described | ({"caption": caption.strip()} if caption and caption.strip() else {})

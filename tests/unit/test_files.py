from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json, sha256_of, write_json, written_aside


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "clip.mp4"
    with written_aside(path) as aside:
        aside.write_bytes(b"half")
        assert aside.parent == path.parent
        assert aside.suffix == ".mp4"
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert os.listdir(path.parent) == ["clip.mp4"]


def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path):
    path = write_json(tmp_path / "card.json", {"step": 1})
    with pytest.raises(RuntimeError, match="killed"), written_aside(path) as aside:
        aside.write_text("{")
        raise RuntimeError("killed")
    assert read_json(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["card.json"]


def test_a_folder_replaces_a_folder_or_stays(tmp_path):
    path = tmp_path / "cache"
    for content in ("old", "new"):
        with written_aside(path) as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    assert os.listdir(path) == ["new"]
    with pytest.raises(RuntimeError, match="killed"), written_aside(path) as aside:
        aside.mkdir()
        raise RuntimeError("killed")
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["cache"]


_KILLED = """
import os, shutil, sys
from pathlib import Path
from nemo_cosmos.files import written_aside

calls_left = int(sys.argv[2])

def killed_at_last(function):
    def run(path, *args, **options):
        global calls_left
        calls_left -= 1
        if calls_left < 0:
            if function is remove:
                os.unlink(Path(path) / "a")  # a kill in the midst of deleting
            os._exit(9)
        return function(path, *args, **options)
    return run

with written_aside(sys.argv[1]) as aside:
    aside.mkdir()
    (aside / "new").touch()
    remove = shutil.rmtree
    os.replace, shutil.rmtree = killed_at_last(os.replace), killed_at_last(remove)
"""


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_kill_while_a_folder_is_replaced_leaves_a_whole_one(tmp_path, calls):
    path = tmp_path / "set"
    path.mkdir()
    (path / "a").touch()
    (path / "b").touch()
    assert subprocess.run([sys.executable, "-c", _KILLED, path, str(calls)], check=False).returncode == 9
    if path.exists():
        assert sorted(os.listdir(path)) in (["a", "b"], ["new"])
    else:
        assert sorted(sorted(os.listdir(folder)) for folder in tmp_path.iterdir()) == [["a", "b"], ["new"]]


def test_a_folder_that_cannot_be_moved_in_leaves_the_old_one(tmp_path, monkeypatch):
    path, replace = tmp_path / "set", os.replace
    path.mkdir()
    (path / "old").touch()

    def fail_with_the_new(source, target):
        if ".old" not in f"{source}{target}":
            raise RuntimeError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_with_the_new)
    with pytest.raises(RuntimeError, match="no"), written_aside(path) as aside:
        aside.mkdir()
    assert os.listdir(tmp_path) == ["set"]
    assert os.listdir(path) == ["old"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "cannot write here"),
        (errno.EROFS, "cannot write here"),
    ],
)
@pytest.mark.parametrize("where", ["in the block", "at the rename"])
def test_a_full_disk_or_a_closed_folder_is_explained(tmp_path, monkeypatch, number, message, where):
    error = OSError(number, os.strerror(number))

    def refuse(*_: object) -> None:
        raise error

    if where == "at the rename":
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=message) as raised, written_aside(tmp_path / "a.json") as aside:
        aside.write_text("{}")
        if where == "in the block":
            raise error
    assert str(tmp_path / "a.json") in str(raised.value)
    assert raised.value.__cause__ is error
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_told_in_one_line_with_the_way_out(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError) as raised, written_aside(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(raised.value) == (
        f"{path}: got 'No space left on device', expected free space to write it. "
        "The disk is full. Free some space and run again; it goes on from here."
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError("1000000 requested and 32752 written"),  # numpy
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch
    ],
    ids=["numpy", "torch"],
)
@pytest.mark.parametrize("free", [0, 1 << 30])
def test_a_full_disk_is_seen_where_a_library_hides_the_reason(tmp_path, monkeypatch, error, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(Exception, match=re.escape(str(error))) as raised, written_aside(tmp_path / "a.npy"):
        raise error
    if free:
        assert raised.value is error
    else:
        assert isinstance(raised.value, UserError) and "The disk is full" in str(raised.value)


def test_a_users_error_is_not_blamed_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="^mine$"), written_aside(tmp_path / "a"):
        raise UserError("mine")


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "a") as aside:
        aside.read_bytes()


def test_json_comes_back_and_equal_values_give_equal_files(tmp_path):
    first = write_json(tmp_path / "a.json", {"b": [1, 2.5, None], "a": "ü"})
    second = write_json(str(tmp_path / "b.json"), {"a": "ü", "b": [1, 2.5, None]})
    assert read_json(first) == {"a": "ü", "b": [1, 2.5, None]}
    assert first.read_bytes() == second.read_bytes()
    assert isinstance(second, Path)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"{", "not valid JSON"), (b"\xff", "not valid JSON")]
)
def test_json_that_cannot_be_read_is_explained(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(path)


def test_sha256_of_a_file_longer_than_one_piece(tmp_path):
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_user_errors_have_one_form():
    error = user_error("fps", -1, "a positive number", "Correct the file.")
    assert isinstance(error, ValueError)
    assert str(error) == "fps: got -1, expected a positive number. Correct the file."

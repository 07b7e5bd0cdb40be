"""The plain files by which megatron-energon reads a folder of webdataset shards, as `energon prepare` writes them.

Written without megatron-energon. `index.sqlite`, which only joins and random access by key need, is left out:
`energon prepare --force-overwrite` adds it.

Source: megatron-energon 7.4, `flavors/webdataset/{config,structs,itar,prepare}.py`.
"""

from __future__ import annotations

import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path

from nemo_cosmos.contracts import Split
from nemo_cosmos.files import write_json, written_aside

ENERGON_FOLDER = ".nv-meta"
_PARTS: dict[Split, str] = {"train": "train", "heldout": "val"}
_DATASET = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
"""Samples are dicts of the members' bytes; a task encoder's cooker makes of them what a model takes."""


def tar_index_of(tar: Path) -> Path:
    """Path of the index beside a tar."""
    return tar.with_name(f"{tar.name}.idx")


def write_tar_index(tar: Path) -> None:
    """Writes where in a finished tar each sample begins, and where the last one ends: offsets in bytes, uint64 each.

    Args:
        tar: Its members are files, those of one sample side by side.
    """
    offsets, key = [], None
    with tarfile.open(tar, "r:") as members:
        for member in members:
            if (found := _key_of(member.name)) != key:
                offsets.append(member.offset)
                key = found
        offsets.append(members.offset)
    with written_aside(tar_index_of(tar)) as aside:
        aside.write_bytes(struct.pack(f"{len(offsets)}Q", *offsets))


def _key_of(name: str) -> str:
    """As energon and webdataset split: the key ends at the first dot of the last part of the path."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def write_energon_metadata(root: str | Path, shards: Mapping[Split, Mapping[str, int]]) -> None:
    """Writes `.nv-meta`: what kind of samples there are, which shards make which split, and how many each one holds.

    Energon calls our held-out split `val`. The file that makes the folder one of energon's comes last.

    Args:
        root: Folder of the shards.
        shards: For each split the number of samples by shard, named relative to `root`. Shards without any are left
            out, as energon refuses them.
    """
    folder = Path(root) / ENERGON_FOLDER
    counts = {split: {name: count for name, count in shards.get(split, {}).items() if count} for split in _PARTS}
    # JSON is YAML.
    write_json(folder / "dataset.yaml", _DATASET)
    write_json(folder / "split.yaml", {"split_parts": {_PARTS[split]: list(counts[split]) for split in _PARTS}})
    write_json(_info_of(root), {"shard_counts": counts["train"] | counts["heldout"]})


def forget_energon_metadata(root: str | Path) -> None:
    """Takes back that the folder is one of energon's, before its shards change."""
    _info_of(root).unlink(missing_ok=True)


def _info_of(root: str | Path) -> Path:
    return Path(root) / ENERGON_FOLDER / ".info.json"

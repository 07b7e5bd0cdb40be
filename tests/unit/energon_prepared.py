"""Holds a folder's energon metadata against what `energon prepare` makes of the same shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml
from braceexpand import braceexpand
from megatron.energon.flavors import BaseWebdatasetFactory


def assert_prepared_as_by_energon(root: Path, scratch: Path) -> None:
    """Compares indices, counts and splits.

    Args:
        root: Folder of shards whose paths tell their split.
        scratch: A copy is prepared here.
    """
    shutil.copytree(root, scratch, ignore=shutil.ignore_patterns(".nv-meta", "*.idx"))
    tars = sorted(str(path.relative_to(scratch)) for path in scratch.rglob("*.tar"))
    patterns = [("train", ".*train"), ("val", ".*heldout")]
    BaseWebdatasetFactory.prepare_dataset(scratch, tars, split_parts_patterns=patterns, workers=1)
    for tar in tars:
        assert (root / f"{tar}.idx").read_bytes() == (scratch / f"{tar}.idx").read_bytes()
    assert len(list(root.rglob("*.idx"))) == len(tars)
    assert _counts(root) == _counts(scratch)
    assert _splits(root) == _splits(scratch)


def _counts(root: Path) -> dict[str, int]:
    return json.loads((root / ".nv-meta" / ".info.json").read_text())["shard_counts"]


def _splits(root: Path) -> dict[str, list[str]]:
    parts = yaml.safe_load((root / ".nv-meta" / "split.yaml").read_text())["split_parts"]
    return {part: [name for pattern in names for name in braceexpand(pattern)] for part, names in parts.items()}

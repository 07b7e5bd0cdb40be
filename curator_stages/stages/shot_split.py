"""Shot split: decodes a span once, finds the cuts and makes clips of the windows between them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.config import CurationConfig
from curator_stages.decode import DecodedSpan, decode_span
from curator_stages.faults import reason_of
from curator_stages.gpu_shares import network_gpus, with_gpus
from curator_stages.shots import make_detector, windows
from curator_stages.source_frames import DecodeLimits
from curator_stages.tasks import Clip, ClipsTask, SpanTask, VideoSpan, clip_id_of, empty_clip
from nemo_cosmos.contracts import ClipRecord

_EARLY_S = 1.0
"""Sound may last longer than the pictures by less, which a header that tells of the whole file then tells of too."""


@dataclass
class ShotSplitStage(ProcessingStage[SpanTask, ClipsTask]):
    """Turns a span into clips at the stored size; what is too short or damaged becomes a rejected row."""

    config: CurationConfig
    name: str = "shot_split"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Asks for a share of a GPU where TransNetV2 runs on one."""
        if self.config.shot_detector == "transnetv2":
            self.resources = with_gpus(self.resources, network_gpus(self.config.device))

    def inputs(self) -> tuple[list[str], list[str]]:
        """Spans."""
        return ["data"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Clips with their span."""
        return ["data", "span"], []

    def setup(self, worker_metadata: WorkerMetadata | None = None) -> None:
        """Makes the shot detector."""
        self._detector = make_detector(self.config)

    def process(self, task: SpanTask) -> ClipsTask:
        """Splits one span."""
        span = task.data
        try:
            clips = self._split(span)
        except Exception as error:  # noqa: BLE001 - a decoder or file system may raise anything
            clips = [empty_clip(span, self.name, reason_of(error, self.name, span.source_video), failed=True)]
        return ClipsTask(
            dataset_name=task.dataset_name,
            data=clips,
            span=span,
            _stage_perf=task._stage_perf,
            _metadata=task._metadata,
        )

    def _split(self, span: VideoSpan) -> list[Clip]:
        config, fps = self.config, span.video.fps
        if span.error:
            return [empty_clip(span, "read", span.error)]
        if span.max_clips == 0:
            end = span.video.num_frames if span.end_frame is None else span.end_frame
            return [self._left_out(span, span.start_frame, end)]
        decoded = decode_span(
            span.path,
            start_frame=span.start_frame,
            end_frame=span.end_frame,
            fps=fps,
            size=config.stored_size,
            # The last span is the longest: it holds up to half a span more than the others.
            most_frames=max(2, round(2 * config.span_s * fps)),
            limits=DecodeLimits(max_pixels=config.max_source_pixels, timeout_s=config.decode_timeout_s),
            # Of every clip that is long enough to be kept there is one.
            sample_every=max(1, int(min(1.0, config.min_s) * fps)) if config.wants_samples else None,
            with_codec_motion=config.motion_method == "motion_vectors",
        )
        decoded.error = decoded.error or _early_end(span, decoded)
        if reason := _unusable(span, decoded):
            return [empty_clip(span, self.name, reason, failed=decoded.failed)]
        clips = self._clips(span, decoded)
        if decoded.error:
            after = span.start_frame + len(decoded.frames)
            clips.append(empty_clip(span, self.name, decoded.error, start_frame=after, failed=decoded.failed))
        return clips

    def _clips(self, span: VideoSpan, decoded: DecodedSpan) -> list[Clip]:
        frames, fps, config = decoded.frames, span.video.fps, self.config
        cuts = [] if span.simulated else self._detector.cuts(frames, fps)
        length, least = max(2, round(config.max_s * fps)), max(2, round(config.min_s * fps))
        stride = max(1, round((config.stride_s or config.max_s) * fps))
        clips, taken = [], 0
        for start, end in windows(len(frames), cuts, length=length, stride=stride):
            if taken == span.max_clips:
                clips.append(self._left_out(span, span.start_frame + start, span.start_frame + len(frames)))
                break
            clip = self._clip(span, decoded, start, end)
            if end - start < least:
                clip.reject(self.name, f"{(end - start) / fps:.2f} s long, shorter than {config.min_s:g} s")
            else:
                taken += 1
            clips.append(clip)
        return clips

    def _left_out(self, span: VideoSpan, start: int, end: int) -> Clip:
        """Makes the row that tells of video which `max_clips_per_video` leaves out."""
        left_out_s = (end - start) / span.video.fps
        row = empty_clip(span, self.name, f"{left_out_s:.2f} s left out by max_clips_per_video", start_frame=start)
        row.record = replace(row.record, scores={"left_out_s": left_out_s})
        return row

    def _clip(self, span: VideoSpan, decoded: DecodedSpan, start: int, end: int) -> Clip:
        first, (height, width) = span.start_frame + start, decoded.frames[start].shape[:2]
        record = ClipRecord(
            clip_id=clip_id_of(span.source_video, first, first + end - start),
            source_video=span.source_video,
            source=span.video.source,
            rollout=span.video.rollout,
            split=span.video.split,
            start_frame=first,
            num_frames=end - start,
            fps=span.video.fps,
            height=height,
            width=width,
            scores={"source_height": float(decoded.source_height), "source_width": float(decoded.source_width)},
            tags=_source_tags(decoded),
        )
        return Clip(
            record=record,
            frames=np.stack(decoded.frames[start:end]),
            samples=[picture for place, picture in decoded.samples.items() if start <= place < end],
            # The first frame's motion is that since the shot before.
            codec_motion={place - start: f for place, f in decoded.codec_motion.items() if start < place < end},
            thumbnail=_jpeg(decoded.frames[(start + end) // 2]),
        )


def _unusable(span: VideoSpan, decoded: DecodedSpan) -> str | None:
    """Says why no clip can be made of a span, or None."""
    count = len(decoded.frames)
    if count == 0:
        return decoded.error or "no frame could be decoded"
    if span.start_frame == 0 and count == 1 and span.end_frame is None:
        return decoded.error or "holds a single frame"
    promised = span.video.num_frames
    if span.simulated and span.end_frame is None and span.start_frame + count != promised:
        return decoded.error or f"its sidecar tells of {promised} frames, the file holds {span.start_frame + count}"
    return None


def _early_end(span: VideoSpan, decoded: DecodedSpan) -> str | None:
    """Tells where a file ends well before what its header tells of, as truncated Matroska does without an error."""
    end, promised = span.start_frame + len(decoded.frames), span.video.num_frames
    expected = promised if span.end_frame is None else span.end_frame
    if span.simulated or expected - end < _EARLY_S * span.video.fps:
        return None
    return f"the file ends after frame {end}, of {promised} that its header or sidecar tells of"


def _source_tags(decoded: DecodedSpan) -> tuple[str, ...]:
    tags = []
    if decoded.deinterlaced:
        tags.append("source:interlaced")
    # A few frames less or more are the rounding of a header, not another rate.
    if decoded.num_uneven > 1 + len(decoded.frames) // 100:
        tags.append("source:variable_frame_rate")
    return tuple(tags)


def _jpeg(picture: np.ndarray) -> bytes:
    import cv2

    _, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
    return data.tobytes()

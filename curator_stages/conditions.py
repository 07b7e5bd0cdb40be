"""What a sidecar says, checked and cut down to one clip."""

from __future__ import annotations

import sys
import typing

from nemo_cosmos.contracts import ACTION_DIM, CaptionWindow, Conditions, RawVideo, Split


def problem_with(video: RawVideo) -> str | None:
    """Says what is wrong with a sidecar, whose values are of any type that JSON has, or None.

    Every list must fit `num_frames`: actions and controls have one entry less than there are frames.
    """
    plain = (
        ("source", _is_text(video.source), "a word"),
        ("rollout", _is_text(video.rollout), "a word"),
        ("fps", _is_number(video.fps) and video.fps > 0, "a number above 0"),
        ("num_frames", _is_count(video.num_frames) and video.num_frames > 0, "a whole number above 0"),
        ("split", video.split in typing.get_args(Split), f"one of {typing.get_args(Split)}"),
        ("seed", video.seed is None or isinstance(video.seed, int), "a whole number"),
        ("licence", video.licence is None or isinstance(video.licence, str), "text"),
        ("conditions", isinstance(video.conditions, Conditions), "a record"),
        ("captions", isinstance(video.captions, tuple), "a list of records"),
    )
    for name, is_right, expected in plain:
        if not is_right:
            return f"{name}: got {getattr(video, name)!r:.60}, expected {expected}"
    for caption in video.captions:
        if not _is_caption(caption):
            return f"captions: got {caption!r:.120}, expected text for frames from start_frame up to end_frame"
    return _problem_with_conditions(video.conditions, video.num_frames)


def _problem_with_conditions(conditions: Conditions, frames: int) -> str | None:
    for name, shape in (
        ("actions", (frames - 1, ACTION_DIM)),
        ("controls", (frames - 1, None)),
        ("camera_poses", (frames, 4, 4)),
        ("intrinsics", (3, 3)),
    ):
        values = getattr(conditions, name)
        if values is not None and (problem := _problem_with_array(name, values, shape)):
            return problem
    if conditions.view is not None and not _is_text(conditions.view):
        return f"view: got {conditions.view!r:.60}, expected a word"
    return None


def _problem_with_array(name: str, values: object, shape: tuple[int | None, ...]) -> str | None:
    """Says where nested lists are not finite numbers of a shape, in which None is any length, or None."""
    if not shape:
        return None if _is_number(values) else f"{name}: got {values!r:.60}, expected a number"
    if not isinstance(values, list):
        return f"{name}: got {values!r:.60}, expected a list"
    if shape[0] is not None and len(values) != shape[0]:
        return f"{name}: got {len(values)} entries, expected {shape[0]}"
    problems = (_problem_with_array(f"{name}[{i}]", value, shape[1:]) for i, value in enumerate(values))
    return next(filter(None, problems), None)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_number(value: object) -> bool:
    """Tells a finite number; JSON as Python reads it has NaN, infinities and whole numbers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_caption(caption: CaptionWindow) -> bool:
    start, end = caption.start_frame, caption.end_frame
    return (
        _is_count(start)
        and _is_count(end)
        and start < end
        and isinstance(caption.text, str)
        and _is_text(caption.captioner)
    )


def is_simulated(video: RawVideo) -> bool:
    """Says whether the sidecar tells what a simulator did, rather than only naming a real video."""
    conditions = video.conditions
    known = (conditions.actions, conditions.controls, conditions.camera_poses)
    return any(values is not None for values in known) or any(c.captioner == "simulator" for c in video.captions)


def slice_conditions(conditions: Conditions, start_frame: int, num_frames: int) -> Conditions:
    """Cuts conditions to frames [start_frame, start_frame + num_frames); actions get one entry less than frames."""
    last = start_frame + num_frames - 1
    return Conditions(
        actions=None if conditions.actions is None else conditions.actions[start_frame:last],
        controls=None if conditions.controls is None else conditions.controls[start_frame:last],
        camera_poses=None if conditions.camera_poses is None else conditions.camera_poses[start_frame : last + 1],
        intrinsics=conditions.intrinsics,
        view=conditions.view,
    )


def slice_captions(captions: tuple[CaptionWindow, ...], start_frame: int, num_frames: int) -> tuple[CaptionWindow, ...]:
    """Keeps the caption windows that overlap a clip, counted from the clip's start and cut at its borders."""
    sliced = []
    for window in captions:
        start = max(window.start_frame - start_frame, 0)
        end = min(window.end_frame - start_frame, num_frames)
        if start < end:
            sliced.append(CaptionWindow(start_frame=start, end_frame=end, text=window.text, captioner=window.captioner))
    return tuple(sliced)


def cover_crop_intrinsics(
    intrinsics: list[list[float]], old_size: tuple[int, int], new_size: tuple[int, int]
) -> list[list[float]]:
    """Fits a pinhole matrix to frames that `video_io.resize_frames` scaled to cover a size and cropped.

    Args:
        intrinsics: [3, 3] in pixels of the old frames; the image spans [0, W] x [0, H].
        old_size: Height and width before.
        new_size: Height and width after.

    Returns:
        [3, 3] in pixels of the new frames.
    """
    (old_height, old_width), (height, width) = old_size, new_size
    scale = max(height / old_height, width / old_width)
    scaled_width, scaled_height = max(width, round(old_width * scale)), max(height, round(old_height * scale))
    scale_x, scale_y = scaled_width / old_width, scaled_height / old_height
    left, top = (scaled_width - width) // 2, (scaled_height - height) // 2
    (fx, skew, cx), (_, fy, cy), bottom = intrinsics
    return [[fx * scale_x, skew * scale_x, cx * scale_x - left], [0.0, fy * scale_y, cy * scale_y - top], list(bottom)]

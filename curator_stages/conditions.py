"""What a sidecar says, checked and cut down to one clip."""

from __future__ import annotations

from nemo_cosmos.contracts import ACTION_DIM, CaptionWindow, Conditions, RawVideo


def problem_with(video: RawVideo) -> str | None:
    """Says what is wrong with a sidecar's conditions, or None.

    Every list must fit `num_frames`: actions and controls have one entry less than there are frames.
    """
    conditions, frames = video.conditions, video.num_frames
    for name, values, length in (
        ("actions", conditions.actions, frames - 1),
        ("controls", conditions.controls, frames - 1),
        ("camera_poses", conditions.camera_poses, frames),
    ):
        if values is not None and len(values) != length:
            return f"{name}: got {len(values)} entries, expected {length} for {frames} frames"
    widths = sorted({len(action) for action in conditions.actions or []} - {ACTION_DIM})
    if widths:
        return f"actions: got width {widths[0]}, expected {ACTION_DIM}"
    if any(len(pose) != 4 or {len(row) for row in pose} != {4} for pose in conditions.camera_poses or []):
        return "camera_poses: expected 4x4 matrices"
    return None


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

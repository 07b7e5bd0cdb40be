"""Where a picture shows text: the networks of PP-OCRv4 that the package rapidocr-onnxruntime carries.

One finds regions that may be text, faces and bright spots among them; the other tries to read them, and what it reads
nothing in is none.

Source: Liao et al. 2020, "Real-time scene text detection with differentiable binarization",
https://arxiv.org/abs/1911.08947.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_cosmos.errors import UserError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_SHORT_SIDE = 544
_MULTIPLE = 32
_PIXEL, _BOX = 0.3, 0.5
"""Probabilities from which on a pixel, and a region on average, is text."""
_UNCLIP = 1.6
"""The network marks the cores of lines; a line is its core grown by this times area over perimeter."""
_MIN_CORE = 3
_LINE_HEIGHT, _LONGEST_LINE = 48, 640
"""Size in pixels at which lines are read."""
_READABLE = 0.6
"""Mean probability of the letters of a line; less is a face or a bright spot that looks like a letter or two."""

Rectangle = tuple[Sequence[float], Sequence[float], float]
"""Centre, width and height, and angle in degrees, as OpenCV has them."""


class TextDetector:
    """Marks text in pictures; the package is not imported, only its file of weights is read."""

    def __init__(self, device: str) -> None:
        """Loads the network.

        Args:
            device: `cpu`, or `cuda` where onnxruntime is built for it.

        Raises:
            UserError: A package is missing.
        """
        models = _models()
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("overlay text: needs the package onnxruntime. Install it.") from error
        options = onnxruntime.SessionOptions()
        if device == "cpu":
            options.intra_op_num_threads = 1
        providers = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
        self._finder, self._reader = (
            onnxruntime.InferenceSession(str(models / f"ch_PP-OCRv4_{part}_infer.onnx"), options, providers=providers)
            for part in ("det", "rec")
        )

    def masks(self, pictures: np.ndarray) -> np.ndarray:
        """Marks what is text.

        Args:
            pictures: uint8 RGB [N, H, W, 3].

        Returns:
            bool [N, h, w] at the network's size, whose shorter side is about 544.
        """
        import cv2

        scale = _SHORT_SIDE / min(pictures.shape[1:3])
        height, width = (max(1, round(side * scale / _MULTIPLE)) * _MULTIPLE for side in pictures.shape[1:3])
        scaled = np.stack([cv2.resize(picture, (width, height)) for picture in pictures])
        probabilities = _run(self._finder, scaled)[:, 0]
        masks = np.zeros((len(scaled), height, width), np.uint8)
        for mask, picture, probability in zip(masks, scaled, probabilities, strict=True):
            for line in _lines(probability):
                if self._is_read(picture, line):
                    cv2.fillPoly(mask, [cv2.boxPoints(line).round().astype(np.int32)], (1,))
        return masks.astype(bool)

    def _is_read(self, picture: np.ndarray, line: Rectangle) -> bool:
        """Says whether two letters and more are read in what may be a line."""
        letters = _run(self._reader, _cut_out(picture, line)[None])[0]  # a probability of each, and of none, by place
        best, probability = letters.argmax(axis=1), letters.max(axis=1)
        begins = (best > 0) & np.append(True, best[1:] != best[:-1])
        return begins.sum() >= 2 and float(probability[begins].mean()) >= _READABLE


def _run(session: InferenceSession, pictures: np.ndarray) -> np.ndarray:
    """Runs a network on uint8 RGB [N, H, W, 3]."""
    bgr = np.ascontiguousarray(pictures[..., ::-1].transpose(0, 3, 1, 2), np.float32) / 127.5 - 1
    return session.run(None, {session.get_inputs()[0].name: bgr})[0]


def _cut_out(picture: np.ndarray, line: Rectangle) -> np.ndarray:
    """Returns a line lying flat, uint8 [48, w, 3]."""
    import cv2

    centre, (width, height), angle = line
    if width < height:
        width, height, angle = height, width, angle - 90  # from which on boxPoints begins at the lower left
    length = int(np.clip(_LINE_HEIGHT * width / height, _LINE_HEIGHT, _LONGEST_LINE))
    corners = cv2.boxPoints((centre, (width, height), angle))  # from the lower left one on, clockwise
    flat = np.array([[0, _LINE_HEIGHT], [0, 0], [length, 0], [length, _LINE_HEIGHT]], np.float32)
    turn = cv2.getPerspectiveTransform(corners.astype(np.float32), flat)
    return cv2.warpPerspective(picture, turn, (length, _LINE_HEIGHT))


def _lines(probability: np.ndarray) -> Iterator[Rectangle]:
    """Grows the cores of what may be lines of text, in float [h, w], to the lines themselves."""
    import cv2

    cores = (probability > _PIXEL).astype(np.uint8)
    contours, _ = cv2.findContours(cores, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    for contour in contours:
        centre, (width, height), angle = cv2.minAreaRect(contour)
        if min(width, height) < _MIN_CORE:
            continue
        inside = cv2.drawContours(np.zeros_like(cores), [contour], -1, (1,), cv2.FILLED).astype(bool)
        if probability[inside].mean() < _BOX:
            continue
        grown = _UNCLIP * width * height / (2 * (width + height))
        yield centre, (width + 2 * grown, height + 2 * grown), angle


def _models() -> Path:
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "overlay text: needs the package rapidocr-onnxruntime, whose weights find text. Install it, or set "
            "overlay_text_max_area to null."
        )
    return Path(package.submodule_search_locations[0]) / "models"

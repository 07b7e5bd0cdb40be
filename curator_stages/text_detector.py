"""Where a picture shows text: the detection network of PP-OCRv4 that the package rapidocr-onnxruntime carries.

Source: Liao et al. 2020, "Real-time scene text detection with differentiable binarization",
https://arxiv.org/abs/1911.08947.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from nemo_cosmos.errors import UserError

_SHORT_SIDE = 544
_MULTIPLE = 32
_PIXEL, _BOX = 0.3, 0.5
"""Probabilities from which on a pixel, and a region on average, is text."""
_UNCLIP = 1.6
"""The network marks the cores of lines; a line is its core grown by this times area over perimeter."""
_MIN_CORE = 3


class TextDetector:
    """Marks text in pictures; the package is not imported, only its file of weights is read."""

    def __init__(self, device: str) -> None:
        """Loads the network.

        Args:
            device: `cpu`, or `cuda` where onnxruntime is built for it.

        Raises:
            UserError: A package is missing.
        """
        weights = _weights()
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("overlay text: needs the package onnxruntime. Install it.") from error
        options = onnxruntime.SessionOptions()
        if device == "cpu":
            options.intra_op_num_threads = 1
        providers = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(str(weights), options, providers=providers)
        self._input = self._session.get_inputs()[0].name

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
        bgr = np.ascontiguousarray(scaled[..., ::-1].transpose(0, 3, 1, 2), np.float32) / 127.5 - 1
        probabilities = self._session.run(None, {self._input: bgr})[0][:, 0]
        return np.stack([_lines(probability) for probability in probabilities])


def _lines(probability: np.ndarray) -> np.ndarray:
    """Grows the cores of lines of text, float [h, w], to the lines themselves, bool [h, w]."""
    import cv2

    cores = (probability > _PIXEL).astype(np.uint8)
    mask = np.zeros_like(cores)
    contours, _ = cv2.findContours(cores, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    for contour in contours:
        centre, (width, height), angle = cv2.minAreaRect(contour)
        if min(width, height) < _MIN_CORE:
            continue
        inside = cv2.drawContours(np.zeros_like(cores), [contour], -1, (1,), cv2.FILLED).astype(bool)
        if probability[inside].mean() < _BOX:
            continue
        grown = _UNCLIP * width * height / (2 * (width + height))
        corners = cv2.boxPoints((centre, (width + 2 * grown, height + 2 * grown), angle))
        cv2.fillPoly(mask, [corners.round().astype(np.int32)], (1,))
    return mask.astype(bool)


def _weights() -> Path:
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "overlay text: needs the package rapidocr-onnxruntime, whose weights find text. Install it, or set "
            "overlay_text_max_area to null."
        )
    return Path(package.submodule_search_locations[0]) / "models" / "ch_PP-OCRv4_det_infer.onnx"

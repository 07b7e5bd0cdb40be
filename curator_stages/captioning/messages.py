"""Requests as chats in OpenAI's form, which vLLM and all compatible servers take."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from curator_stages.captioning.captioner import CaptionRequest


def chat_of(request: CaptionRequest) -> list[dict[str, Any]]:
    """Returns one user message: the frames as JPEG in data addresses, then the prompt."""
    pictures = [{"type": "image_url", "image_url": {"url": _address_of(frame)}} for frame in request.frames]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": request.prompt}]}]


def _address_of(frame: np.ndarray) -> str:
    import cv2

    _, data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92])
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"

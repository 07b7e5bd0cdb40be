from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation import rate_distortion
from nemo_cosmos.files import read_json
from nemo_cosmos.steps import evaluate_tokenizer as step
from nemo_cosmos.steps.video_source import files_of
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.load import LoadedTokenizer
from nemo_cosmos.tokenizer.model import build_tokenizer
from nemo_cosmos.tokenizer.reconstruction import CodingConfig
from nemo_cosmos.video_io import write_video

CONFIG = TokenizerConfig(channels=8, channels_mult=(1, 2), num_res_blocks=1, latent_channels=4, patch_size=8)


class MeanDifference(torch.nn.Module):
    """Stands for LPIPS-like, and costs nothing."""

    def frames(self, truth, predictions):
        return np.stack([np.abs(truth.astype(float) - p).mean(axis=(1, 2, 3)) / 255 for p in predictions])


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    monkeypatch.setattr(step, "LpipsLike", MeanDifference)


@pytest.fixture
def folder(tmp_path):
    """Two videos, one of odd length, a picture of odd size, a broken video and a file that is neither."""
    root = tmp_path / "in"
    (root / "drives").mkdir(parents=True)
    x, y = np.meshgrid(np.arange(64), np.arange(48))
    frames = np.stack([127 + 100 * np.sin((x + 2 * t) / 9) * np.cos(y / 7) for t in range(20)])
    pixels = np.repeat(frames[..., None], 3, axis=-1).astype(np.uint8)
    write_video(root / "drives" / "a.mp4", pixels, fps=10)
    write_video(root / "drives" / "b.mp4", pixels[:17, ::-1].copy(), fps=10)
    Image.fromarray(pixels[0, :33, :51]).save(root / "c.png")
    (root / "broken.mp4").write_bytes(b"no video at all")
    (root / "notes.txt").write_text("neither video nor picture")
    (root / ".hidden.mp4").write_bytes(b"")
    return root


def test_a_folder_is_measured_and_what_is_broken_is_told(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "CRFS", (20, 44))
    output = tmp_path / "out"
    summary = step.evaluate_tokenizer(folder, output)
    assert summary["num_clips"] == 3
    assert "cannot" not in str(summary["methods"]) and "Invalid data" in summary["failed"]["broken.mp4"]
    found = read_json(output / "measures.json")
    videos = {v["name"]: v for v in found["videos"]}
    assert list(videos) == ["c.png", "drives/a.mp4", "drives/b.mp4"]
    assert (videos["drives/a.mp4"]["num_frames"], videos["c.png"]["num_frames"]) == (20, 1)
    assert (videos["c.png"]["height"], videos["c.png"]["width"]) == (33, 51)
    # 16 numbers of 16 bits per latent pixel; 20 frames are padded to 25, four latent frames; 33x51 to 40x56.
    assert videos["drives/a.mp4"]["bits_per_pixel"] == pytest.approx(4 * 256 / 64 / 20)
    assert videos["c.png"]["bits_per_pixel"] == pytest.approx(256 * 5 * 7 / (33 * 51))
    assert found["codebook"] is None
    assert found["frechet"]["num_clips"] == 3 and found["frechet"]["distance"] > 0
    assert "rFVD" not in str(found)
    curves = found["codecs"]["H.264"]
    assert curves[0]["bits_per_pixel"] > curves[1]["bits_per_pixel"]
    assert found["seams"]["num_joints"] == 1
    assert set(found["by_source"]) == {"in", "drives"}
    page = (output / "report.html").read_text()
    assert '="http' not in page and "broken.mp4" in page
    with Image.open(output / "sheet.png") as sheet, Image.open(output / "rate_distortion.png") as plot:
        assert sheet.height > 3 * 48
        assert plot.width > 400


def test_windows_have_seams_that_one_stream_has_not(folder, tmp_path):
    one, cut = (
        step.evaluate_tokenizer(folder, tmp_path / name, coding=coding, fast=True)
        for name, coding in (("one", None), ("cut", CodingConfig(temporal_window=9)))
    )
    assert read_json(tmp_path / "cut" / "measures.json")["coding"] == "windows of 9 frames, whole pictures"
    assert one["psnr_db_at_equal_bits"] == {} and one["frechet_distance"] is None
    assert not (tmp_path / "one" / "rate_distortion.png").exists()
    assert (one["seams"]["window_frames"], cut["seams"]["window_frames"]) == (17, 9)
    assert cut["seams"]["num_joints"] == 3
    assert cut["seams"]["change_at_joints_db"] < cut["seams"]["change_elsewhere_db"]


@pytest.mark.parametrize("modality", ["video", "image"])
def test_codebook_use_and_bits_of_a_discrete_tokenizer(folder, tmp_path, monkeypatch, modality):
    temporal_compression = {"video": 8, "image": 1}[modality]
    config = TokenizerConfig(
        modality=modality,
        channels=32,
        channels_mult=(1, 2),
        num_res_blocks=1,
        latent_channels=2,
        z_channels=4,
        levels=(8, 5),
        patch_size=8,
        temporal_compression=temporal_compression,
    )
    torch.manual_seed(0)
    model = build_tokenizer(config).eval()
    monkeypatch.setattr(step, "load_tokenizer", lambda _: LoadedTokenizer(model=model, name="discrete"))
    summary = step.evaluate_tokenizer(folder / "drives", tmp_path / "out", fast=True)
    # Videos of 20 and 17 frames: 4 + 3 latent frames, or all frames alone, of 6 x 8 tokens.
    use, frames = summary["codebook"], {"video": (4, 3), "image": (20, 17)}[modality]
    assert (use["codebook_size"], use["num_tokens"]) == (40, sum(frames) * 48)
    assert 1 / 40 <= use["share_used"] <= 1
    assert 1 <= use["perplexity"] <= 40 * use["share_used"] + 1e-9
    expected = np.mean([n * 48 * math.log2(40) / (t * 48 * 64) for n, t in zip(frames, (20, 17), strict=True)])
    assert summary["bits_per_pixel"] == pytest.approx(expected)
    assert summary["stored_as"] == "log2(40) for each token"


def test_a_missing_encoder_is_told_and_passed_over(folder, tmp_path, monkeypatch):
    available = rate_distortion.av.codecs_available - {"libx265"}
    monkeypatch.setattr(rate_distortion.av, "codecs_available", available)
    monkeypatch.setattr(step, "CRFS", (30,))
    monkeypatch.setattr(step, "ClipFeatures", lambda _: lambda frames: frames.mean((1, 2))[0])
    summary = step.evaluate_tokenizer(folder, tmp_path / "out", max_frames=2)
    assert set(summary["psnr_db_at_equal_bits"]) == {"H.264"}
    assert summary["missing_codecs"] == {"H.265": "this build of PyAV has no libx265"}
    assert "H.265 was not measured" in (tmp_path / "out" / "report.html").read_text()


def test_folders_without_anything_to_measure_are_refused(tmp_path):
    with pytest.raises(UserError, match="an existing folder"):
        step.evaluate_tokenizer(tmp_path / "nowhere", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match="a folder with videos or pictures"):
        step.evaluate_tokenizer(empty, tmp_path / "out")
    (empty / "a.mp4").write_bytes(b"broken")
    with pytest.raises(UserError, match="None of 1 files could be measured; the first, a.mp4: .*Invalid data"):
        step.evaluate_tokenizer(empty, tmp_path / "out", fast=True)
    assert not (tmp_path / "out").exists()


def test_only_the_asked_frames_are_read(folder):
    a = files_of(folder, max_frames=5)[2]
    assert (a.name, a.source) == ("drives/a.mp4", "drives")
    assert a.probe() == (5, 10.0)
    assert len(list(a.frames())) == len(list(a.frames())) == 5
    with pytest.raises(UserError, match="max_frames"):
        files_of(folder, max_frames=0)

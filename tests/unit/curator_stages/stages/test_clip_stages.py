"""The stages that work on one span's clips."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from nemo_curator.stages.resources import Resources
from PIL import Image
from safetensors.torch import save_file

from curator_stages.config import CurationConfig
from curator_stages.decode import DecodedSpan
from curator_stages.pipeline import CurateClips, curate
from curator_stages.stages import transcode
from curator_stages.stages.embed import EmbedStage
from curator_stages.stages.motion import MotionFilterStage
from curator_stages.stages.preview import PreviewStage
from curator_stages.stages.reader import plan_spans
from curator_stages.stages.save_span import SaveSpanStage
from curator_stages.stages.shot_split import ShotSplitStage
from curator_stages.stages.transcode import TranscodeStage, encode_h264
from curator_stages.tasks import ClipsTask, SpanTask
from curator_stages.video_embedders import embedding_dim, make_embedder
from curator_stages.work import WorkFolder
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import write_json
from nemo_cosmos.video_io import read_video, resize_frames, write_video
from tests.unit.curator_stages.samples import SIZE, moving_texture, real_frames, simulated_video, write_simulated


def split(folder: Path, config: CurationConfig, index: int = 0) -> ClipsTask:
    span = plan_spans(folder, folder / "out", config)[index]
    stage = ShotSplitStage(config=config)
    stage.setup()
    return stage.process(SpanTask(dataset_name="d", data=span))


def test_clips_are_shots_cut_into_windows(tmp_path: Path, config: CurationConfig) -> None:
    frames = np.concatenate([moving_texture(25, seed=1), moving_texture(3, seed=2), moving_texture(8, seed=3)])
    write_video(tmp_path / "v.mp4", frames, fps=10)
    task = split(tmp_path, replace(config, max_s=1.0))
    spans = [(c.record.start_frame, c.record.num_frames, c.record.rejected_reason) for c in task.data]
    too_short = "0.30 s long, shorter than 0.5 s"
    assert spans == [(0, 10, None), (10, 10, None), (20, 5, None), (25, 3, too_short), (28, 8, None)]
    assert [c.frames.shape for c in task.kept()] == [(n, SIZE, SIZE, 3) for n in (10, 10, 5, 8)]
    assert len({c.record.clip_id for c in task.data}) == 5


def test_shots_under_2_s_are_dropped_and_those_over_60_s_are_cut(tmp_path: Path, config: CurationConfig) -> None:
    shots = [moving_texture(n, seed=n, speed=1) for n in (3, 130, 4)]
    write_video(tmp_path / "v.mp4", np.concatenate(shots), fps=2)
    task = split(tmp_path, replace(config, min_s=2.0, max_s=60.0, span_s=120.0))
    spans = [(c.record.start_frame, c.record.num_frames, c.kept) for c in task.data]
    assert spans == [(0, 3, False), (3, 120, True), (123, 10, True), (133, 4, True)]


def test_largest_number_of_clips_is_kept_to(tmp_path: Path, config: CurationConfig) -> None:
    write_video(tmp_path / "v.mp4", moving_texture(60, seed=1), fps=10)
    capped = replace(config, max_s=1.0, span_s=2.0, max_clips_per_video=3)
    clips = [clip.record for i in range(3) for clip in split(tmp_path, capped, i).data]
    assert [c.start_frame for c in clips if c.rejected_by is None] == [0, 20, 40]
    rest = "1.00 s left out by max_clips_per_video"
    left_out = [(c.start_frame, c.rejected_reason) for c in clips if c.rejected_by == "shot_split"]
    assert left_out == [(10, rest), (30, rest), (50, rest)]


def test_what_is_passed_over_and_what_the_limit_on_clips_leaves_out_is_told(
    tmp_path: Path, config: CurationConfig, capsys: pytest.CaptureFixture
) -> None:
    write_video(tmp_path / "in" / "v.mp4", moving_texture(60, seed=1), fps=10)
    for other in ("v.json.txt", "w.MTS", "sub/x.MTS", "noise", ".hidden.MTS"):
        (tmp_path / "in" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / other).write_bytes(b"x")
    capped = replace(config, max_s=1.0, span_s=1.5, max_clips_per_video=2)
    summary = curate(tmp_path / "in", tmp_path / "out", capped)
    assert summary.left_out_s == pytest.approx(0.5 + 3.0 + 0.5)
    assert summary.rejected["shot_split"] == 3 and summary.num_clips == 5
    page, said = (tmp_path / "out" / "report.html").read_text(), capsys.readouterr().err
    assert "max_clips_per_video left out 0.1 minutes of video" in said and "minutes left out" in page
    assert summary.passed_over == {".MTS": 2, ".txt": 1, "no suffix": 1}
    assert all("2 files with .MTS, 1 files with .txt, 1 files with no suffix" in told for told in (page, said))


@pytest.mark.parametrize(
    ("num_frames", "promised", "reason"),
    [(1, None, "holds a single frame"), (20, 25, "its sidecar tells of 25 frames, the file holds 20")],
)
def test_unusable_frames_are_told(
    tmp_path: Path, config: CurationConfig, num_frames: int, promised: int | None, reason: str
) -> None:
    if promised:
        write_simulated(tmp_path, "v", simulated_video(promised), seed=1)
    write_video(tmp_path / "v.mp4", moving_texture(num_frames, seed=1), fps=10)
    (clip,) = split(tmp_path, config).data
    assert (clip.record.rejected_by, clip.record.rejected_reason) == ("shot_split", reason)


def test_damaged_rest_of_a_video_is_a_row_of_its_own(
    tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "v.mp4", moving_texture(20, seed=1), fps=10)
    frames = [np.zeros((SIZE, SIZE, 3), np.uint8)] * 12
    broken = DecodedSpan(frames=frames, source_height=96, source_width=96, error="bad packet", failed=True)
    monkeypatch.setattr("curator_stages.stages.shot_split.decode_span", lambda *_, **__: broken)
    task = split(tmp_path, config)
    records = [c.record for c in task.data]
    assert [(r.start_frame, r.num_frames, r.rejected_reason) for r in records] == [(0, 12, None), (12, 0, "bad packet")]
    SaveSpanStage(output_dir=str(tmp_path / "out")).process(task)
    work = WorkFolder(tmp_path / "out" / ".work")
    assert work.has(task.span.key) and not work.is_settled(task.span.key)
    monkeypatch.undo()
    SaveSpanStage(output_dir=str(tmp_path / "out")).process(split(tmp_path, config))
    assert work.is_settled(task.span.key)


def test_a_span_that_cannot_be_worked_on_is_a_row(
    tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "v.mp4", moving_texture(20, seed=1), fps=10)

    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError("gone")

    monkeypatch.setattr("curator_stages.stages.shot_split.decode_span", fail)
    (clip,) = split(tmp_path, config).data
    assert clip.failed and clip.record.rejected_reason == "ConnectionResetError: gone"


def test_simulated_video_is_one_shot_and_conditions_follow_its_clips(tmp_path: Path, config: CurationConfig) -> None:
    write_simulated(tmp_path, "v", simulated_video(20), seed=1)
    write_video(tmp_path / "v.mp4", np.concatenate([moving_texture(10, seed=s) for s in (1, 2)]), fps=10)
    config = replace(config, max_s=1.5)
    stage = TranscodeStage(config=config)
    stage.setup()
    task = stage.process(split(tmp_path, config))
    records = [c.record for c in task.data]
    assert [(r.start_frame, r.num_frames) for r in records] == [(0, 15), (15, 5)]
    assert [a[0] for a in records[1].conditions.actions] == [15, 16, 17, 18]
    assert [p[0][0] for p in records[1].conditions.camera_poses] == [15, 16, 17, 18, 19]
    scale = SIZE / 96
    np.testing.assert_allclose(records[0].conditions.intrinsics[0], [50 * scale, 0, 48 * scale])


def test_mp4_has_short_groups_of_pictures_and_good_quality() -> None:
    frames = np.stack(real_frames("bikes", 0, 20, size=128))
    data = encode_h264(frames, fps=10.0, crf=16, gop=8)
    assert data == encode_h264(frames, fps=10.0, crf=16, gop=8)
    decoded, fps = read_video(data)
    error = np.square(decoded.astype(float) - frames).mean()
    assert decoded.shape == frames.shape and fps == 10.0 and 10 * np.log10(255**2 / error) > 38
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        keys = [i for i, packet in enumerate(p for p in container.demux(stream) if p.size) if packet.is_keyframe]
    assert keys == [0, 8, 16]
    assert len(encode_h264(frames, fps=10.0, crf=16, gop=8, preset="superfast")) > 1.05 * len(data)


def test_nvenc_is_taken_where_it_is_there(
    config: CurationConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No machine with NVENC is at hand: whether the codec opens is made up here, and its options were never tried."""
    opened: list[str] = []

    def absent(*_: object, codec: str, **__: object) -> bytes:
        opened.append(codec)
        raise av.error.PermissionError(1, "Operation not permitted")

    def present(*_: object, codec: str, **__: object) -> bytes:
        opened.append(codec)
        return b""

    for found, name, expected in (
        (present, "auto", "h264_nvenc"),
        (present, "h264_nvenc", "h264_nvenc"),
        (absent, "auto", "libx264"),
    ):
        monkeypatch.setattr(transcode, "encode_h264", found)
        assert transcode.choose_encoder(name) == expected
    assert opened == ["h264_nvenc"] * 3 and "clips are encoded by libx264" in caplog.text
    with pytest.raises(UserError, match="encoder: got 'h264_nvenc', expected a GPU with NVENC"):
        TranscodeStage(config=replace(config, encoder="h264_nvenc")).setup()
    assert transcode.choose_encoder("libx264") == "libx264" and len(opened) == 4


@pytest.mark.parametrize(
    ("encoder", "device", "gpus"),
    [("libx264", "cuda", 0.0), ("h264_nvenc", "cpu", 0.33), ("auto", "cpu", 0.0), ("auto", "cuda", 0.33)],
)
def test_a_share_of_a_gpu_is_asked_for_nvenc(config: CurationConfig, encoder: str, device: str, gpus: float) -> None:
    assert TranscodeStage(config=replace(config, encoder=encoder, device=device)).resources.gpus == gpus


def test_stages_alone_and_in_the_pipeline_ask_for_their_share_of_a_gpu(config: CurationConfig) -> None:
    on_gpu = replace(
        config,
        device="cuda:1",
        captioner="vllm:m",
        shot_detector="transnetv2",
        encoder="auto",
        overlay_text_max_area=0.5,
        aesthetic_min=3.5,
        video_types=True,
        text_encoder="minilm-l6",
    )
    quarter = ("shot_split", "overlay_text", "aesthetic_filter", "video_type", "embed", "text_embed")
    expected = dict.fromkeys(quarter, 0.25) | {"transcode": 0.33, "caption": 1.0}
    for chosen, asked in ((on_gpu, expected), (config, {}), (replace(config, captioner="vllm:m"), {"caption": 1.0})):
        stages = CurateClips(input_dir="in", output_dir="out", config=chosen).decompose()
        assert {stage.name: stage.resources.gpus for stage in stages if stage.resources.requires_gpu} == asked
    assert EmbedStage(config=on_gpu).resources == Resources(gpus=0.25)
    assert EmbedStage(config=on_gpu, resources=Resources(cpus=2, gpus=1)).resources == Resources(cpus=2, gpus=1)


def test_previews_are_small_and_move(tmp_path: Path, config: CurationConfig) -> None:
    write_video(tmp_path / "v.mp4", moving_texture(30, seed=1, height=96, width=96), fps=10)
    task = PreviewStage(target_fps=2.0, target_height=32).process(split(tmp_path, replace(config, width=128)))
    (clip,) = task.data
    with Image.open(io.BytesIO(clip.preview)) as animation:
        assert (animation.format, animation.size, animation.n_frames) == ("WEBP", (64, 32), 6)
        assert animation.info["loop"] == 0
        for number in range(6):
            animation.seek(number)
            shown = np.asarray(animation.convert("RGB"), float)
            apart = [np.abs(shown - resize_frames(f[None], 32, 64)[0]).mean() for f in clip.frames]
            # Near the frame of its time, and nearer to it than to those half a second away.
            assert int(np.argmin(apart)) == 5 * number and apart[5 * number] < 20
    larger = PreviewStage(target_fps=100.0, target_height=999)._animation(clip.frames, 10.0)
    with Image.open(io.BytesIO(larger)) as animation:
        assert (animation.size, animation.n_frames) == ((128, SIZE), 30)


def test_one_sample_of_what_each_stage_rejects_is_stored(tmp_path: Path, config: CurationConfig) -> None:
    frames = np.concatenate([moving_texture(10, seed=seed) for seed in range(5)])
    write_video(tmp_path / "v.mp4", frames, fps=10)
    stage = TranscodeStage(config=config)
    stage.setup()
    task = stage.process(split(tmp_path, config))
    for clip, rejected_by in zip(task.data, ("quality", "quality", "caption", None, "quality"), strict=True):
        if rejected_by:
            clip.reject(rejected_by, "because")
    SaveSpanStage(output_dir=str(tmp_path / "out")).process(task)
    stored, _ = WorkFolder(tmp_path / "out" / ".work").read(task.span.key)
    assert [c.file(".mp4").is_file() for c in stored] == [True, False, True, True, False]
    assert all(c.file(".jpg").is_file() for c in stored)


def test_still_clips_are_rejected_even_with_grain(tmp_path: Path, config: CurationConfig) -> None:
    still = np.repeat(moving_texture(1, seed=1), 10, axis=0).astype(int)
    grain = np.random.default_rng(0).normal(0, 2, still.shape)
    write_video(tmp_path / "still.mp4", np.clip(still + grain, 0, 255).astype(np.uint8), fps=10)
    write_video(tmp_path / "moving.mp4", moving_texture(10, seed=1), fps=10)
    for index, kept in ((0, True), (1, False)):
        task = MotionFilterStage(config=config).process(split(tmp_path, config, index))
        assert task.data[0].kept == kept
        assert set(task.data[0].record.scores) > {"motion_global_mean", "motion_per_patch_min_256"}
    assert task.data[0].record.rejected_reason.startswith("too still: motion_global_mean")


def test_embedding_tells_clips_apart_and_drops_frames(tmp_path: Path, config: CurationConfig) -> None:
    write_video(tmp_path / "v.mp4", moving_texture(10, seed=1), fps=10)
    task = split(tmp_path, config)
    (template,) = task.data
    shown = (("carphone_pristine", 60), ("carphone_pristine", 90), ("bikes", 100))
    task.data = [replace(template, frames=np.stack(real_frames(name, n, n + 2, size=128))) for name, n in shown]
    stage = EmbedStage(config=config)
    stage.setup()
    first, second, third = (clip.embedding for clip in stage.process(task).data)
    assert first.dtype == np.float32 and np.linalg.norm(first) == pytest.approx(1, abs=1e-5)
    # The same shot a second later, and another one.
    assert first @ second > 0.8 and first @ third < 0.5
    assert all(clip.frames is None for clip in task.data)
    with pytest.raises(RuntimeError, match=f"{template.record.clip_id}: its frames were dropped"):
        stage.process(task)


_COSMOS_EMBED1 = """
import torch
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature

class Config(PretrainedConfig):
    model_type = "tiny-embed1"

class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def get_video_embeddings(self, videos):
        assert videos.shape[1:] == (8, 3, 4, 4), videos.shape
        means = videos.mean((2, 3, 4)) * self.scale
        return BatchFeature({"visual_proj": means})

class Processor(ProcessorMixin):
    attributes = []
    num_video_frames = 8

    def __call__(self, videos, return_tensors):
        assert return_tensors == "pt"
        return BatchFeature({"videos": torch.from_numpy(videos / 255.0)})
"""


def write_tiny_cosmos_embed1(folder: Path) -> str:
    """A model with code of its own, of Cosmos-Embed1's interface, that embeds a clip as its frames' brightness."""
    folder.mkdir()
    (folder / "tiny_embed1.py").write_text(_COSMOS_EMBED1)
    auto = {"AutoConfig": "tiny_embed1.Config", "AutoModel": "tiny_embed1.Model"}
    write_json(folder / "config.json", {"model_type": "tiny-embed1", "auto_map": auto})
    write_json(folder / "processor_config.json", {"auto_map": {"AutoProcessor": "tiny_embed1.Processor"}})
    save_file({"scale": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("num_frames", [20, 3])
def test_cosmos_embed1_is_shown_as_many_frames_as_it_asks_for(
    tmp_path: Path, config: CurationConfig, monkeypatch: pytest.MonkeyPatch, num_frames: int
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = replace(config, embedding_model=write_tiny_cosmos_embed1(tmp_path / "embed1"))
    frames = np.arange(1, num_frames + 1, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    brightness = 1 + np.linspace(0, num_frames - 1, 8).round()
    expected = brightness / np.linalg.norm(brightness)
    np.testing.assert_allclose(make_embedder(config).embed(frames), expected, rtol=1e-5)
    assert embedding_dim(config) == 768
    with pytest.raises(UserError, match="embedding_model: '.*nowhere' cannot be loaded"):
        make_embedder(replace(config, embedding_model=str(tmp_path / "nowhere")))


def test_cuda_without_a_device_is_a_user_error(config: CurationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="device"):
        EmbedStage(config=replace(config, device="cuda")).setup()

"""The stages that look at single pictures: quality, overlay text, aesthetic score, video type."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from curator_stages import quality
from curator_stages.config import CurationConfig
from curator_stages.pipeline import CurateClips
from curator_stages.stages.aesthetic import AestheticStage, load_head
from curator_stages.stages.overlay_text import OverlayTextStage, text_areas
from curator_stages.stages.quality import QualityStage
from curator_stages.stages.video_type import VideoTypeStage
from curator_stages.tasks import Clip, ClipsTask, VideoSpan
from nemo_cosmos.contracts import ClipRecord, RawVideo
from nemo_cosmos.errors import UserError
from tests.unit.curator_stages.captioning import tiny_vlm
from tests.unit.curator_stages.samples import moving_texture, real_frames

needs_text_weights = pytest.mark.skipif(
    importlib.util.find_spec("rapidocr_onnxruntime") is None, reason="rapidocr-onnxruntime is not installed"
)


def task_of(samples: list[np.ndarray], *, source: tuple[int, int] | None = None) -> ClipsTask:
    height, width = source or samples[0].shape[:2]
    record = ClipRecord(
        clip_id="a", source_video="a.mp4", source="s", rollout="a", split="train", start_frame=0, num_frames=10,
        fps=10.0, height=64, width=64, scores={"source_height": float(height), "source_width": float(width)},
    )  # fmt: skip
    video = RawVideo(source="s", rollout="a", fps=10.0, num_frames=10, split="train")
    span = VideoSpan(path="a.mp4", source_video="a.mp4", key="k", video=video, simulated=False)
    return ClipsTask(dataset_name="d", data=[Clip(record=record, samples=samples)], span=span)


@pytest.fixture(scope="module")
def real() -> list[np.ndarray]:
    return real_frames("bikes", 0, 60, size=256)[::20]


def compressed(picture: np.ndarray, quality_percent: int) -> np.ndarray:
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality_percent])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


def luma(picture: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)


def test_measures_follow_what_they_are_named_after(real: list[np.ndarray]) -> None:
    picture = real[0]
    sharp = [quality.sharpness(luma(cv2.GaussianBlur(picture, (0, 0), sigma))) for sigma in (0.5, 1, 2, 4)]
    assert sharp == sorted(sharp, reverse=True) and sharp[0] > 15 * sharp[-1]
    blocky = [quality.blockiness(luma(compressed(picture, percent))) for percent in (95, 30, 10, 5)]
    assert blocky == sorted(blocky) and blocky[0] < 1.2 and blocky[-1] > 1.5
    flat = np.full((64, 64), 128, np.uint8)
    assert (quality.sharpness(flat), quality.contrast(flat), quality.clipped(flat)) == (0, 0, 0)
    assert quality.blockiness(flat) == 1
    half = np.concatenate([np.zeros((32, 64), np.uint8), np.full((32, 64), 100, np.uint8)])
    assert quality.clipped(half) == 0.5 and quality.contrast(half) == pytest.approx(50 / 255)
    assert quality.clipped(np.full((4, 4), 255, np.uint8)) == 1


def test_quality_is_scored_and_limits_reject(config: CurationConfig, real: list[np.ndarray]) -> None:
    (clip,) = QualityStage(config=config).process(task_of(real)).data
    assert clip.kept and set(clip.record.scores) > {"sharpness", "contrast", "clipped", "blockiness"}
    for limits, samples, reason in (
        ({"min_sharpness": 20.0}, [cv2.GaussianBlur(p, (0, 0), 6) for p in real], "blurred: sharpness"),
        ({"max_clipped": 0.5}, [np.full_like(p, 255) for p in real], "badly exposed: clipped 1.00"),
    ):
        stage = QualityStage(config=replace(config, **limits))
        assert stage.process(task_of(real)).data[0].kept
        assert stage.process(task_of(samples)).data[0].record.rejected_reason.startswith(reason)


def test_blockiness_is_absent_where_the_source_was_scaled_down(config: CurationConfig, real: list[np.ndarray]) -> None:
    (clip,) = QualityStage(config=config).process(task_of(real, source=(1080, 1920))).data
    assert "sharpness" in clip.record.scores and "blockiness" not in clip.record.scores


def test_without_samples_a_stage_says_so(config: CurationConfig) -> None:
    task = task_of([np.zeros((8, 8, 3), np.uint8)])
    task.data[0].drop_pictures()
    with pytest.raises(RuntimeError, match="clip a: has no samples"):
        QualityStage(config=config).process(task)


def titled(picture: np.ndarray, text: str, *, place: tuple[int, int], scale: float = 1.2) -> np.ndarray:
    shown = picture.copy()
    for colour, thickness in (((0, 0, 0), 6), ((255, 255, 255), 2)):
        cv2.putText(shown, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thickness, cv2.LINE_AA)
    return shown


def test_only_text_that_stays_is_overlay() -> None:
    masks = np.zeros((4, 10, 10), bool)
    masks[:, 0] = True  # a tenth, always
    masks[0, 5:] = True  # half, once
    assert text_areas(masks) == (pytest.approx(0.1 + 0.5 / 4), pytest.approx(0.1))


@pytest.mark.parametrize("slope", [-4, 0, 4])
def test_lines_are_read_from_left_to_right(slope: int) -> None:
    cv2 = pytest.importorskip("cv2")
    from curator_stages.text_detector import _cut_out

    # A bar of 200 x 20 pixels, white at its left end, as OpenCV finds its rectangle.
    picture = np.full((120, 240, 3), 40, np.uint8)
    centre, turned = (120.0, 60.0), -float(slope)
    cv2.fillPoly(picture, [cv2.boxPoints((centre, (200, 20), turned)).astype(np.int32)], (90, 90, 90))
    contours, _ = cv2.findContours((picture[..., 0] > 60).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    picture[:, :60] += 160
    flat = _cut_out(picture, cv2.minAreaRect(contours[0])).astype(float)
    assert flat[8:40, :60].mean() > 200 > 100 > flat[8:40, -60:].mean()


@needs_text_weights
def test_overlay_text_is_found_and_rejected(config: CurationConfig) -> None:
    ramp = np.linspace(40, 200, 640).astype(np.uint8)
    pictures = [np.broadcast_to(ramp[None, :, None], (360, 640, 3)).copy()]
    subtitled = [titled(p, "Subscribe to our channel now", place=(40, 330)) for p in pictures]
    stage = OverlayTextStage(config=replace(config, overlay_text_max_area=0.01))
    stage.setup()
    plain, overlaid = (stage.process(task_of(samples)).data[0] for samples in (pictures, subtitled))
    assert plain.kept and plain.record.scores["overlay_text_area"] < 0.002
    # The line is 540 x 40 pixels of 640 x 360, drawn generously.
    assert 0.06 < overlaid.record.scores["overlay_text_area"] < 0.2
    assert overlaid.record.rejected_reason.startswith("overlay text: overlay_text_area")


def test_overlay_text_without_its_weights_is_a_user_error(
    config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curator_stages.text_detector.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="rapidocr-onnxruntime"):
        OverlayTextStage(config=config).setup()


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights whose embeddings are as wide as ViT-L/14's, and an aesthetic head."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = tiny_vlm.byte_tokenizer()
    tokenizer.save_pretrained(folder)
    # With id 2, as in OpenAI's own configs, the sentence's state is that at its largest token.
    text = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=128, eos_token_id=2)  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                  patch_size=8)  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    sizes = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    layers = {i: torch.nn.Linear(*size) for i, size in sizes.items()}
    weights = {f"layers.{i}.{name}": value.detach() for i, layer in layers.items()
               for name, value in layer.named_parameters()}  # fmt: skip
    (folder / "head").mkdir()
    save_file(weights, folder / "head" / "model.safetensors")
    return folder


def test_aesthetic_score_is_the_published_layers_in_their_order(
    config: CurationConfig, tiny_clip: Path, real: list[np.ndarray]
) -> None:
    from safetensors.torch import load_file

    config = replace(config, clip_model=str(tiny_clip), aesthetic_model=str(tiny_clip / "head"), aesthetic_min=-100.0)
    stage = AestheticStage(config=config)
    stage.setup()
    (clip,) = stage.process(task_of(real)).data
    weights = load_file(tiny_clip / "head" / "model.safetensors")
    state = stage._clip.embed_pictures(real)
    torch.testing.assert_close(state.norm(dim=-1), torch.ones(len(real)))
    for i in (0, 2, 4, 6, 7):
        state = torch.nn.functional.linear(state, weights[f"layers.{i}.weight"], weights[f"layers.{i}.bias"])
    assert clip.record.scores["aesthetic"] == pytest.approx(float(state.mean()), abs=1e-5) and clip.kept
    stage.config = replace(config, aesthetic_min=100.0)
    assert stage.process(task_of(real)).data[0].record.rejected_reason.endswith("is below 100")


def test_nemo_curator_knows_the_same_head(tiny_clip: Path) -> None:
    from nemo_curator.models.aesthetics import MLP
    from safetensors.torch import load_file

    theirs = MLP()
    theirs.load_state_dict(load_file(tiny_clip / "head" / "model.safetensors"))
    x = torch.randn(3, 768)
    torch.testing.assert_close(load_head(str(tiny_clip / "head"))(x), theirs.eval()(x))


def test_video_type_is_the_nearest_sentence(config: CurationConfig, tiny_clip: Path, real: list[np.ndarray]) -> None:
    stage = VideoTypeStage(config=replace(config, clip_model=str(tiny_clip), video_types=True))
    stage.setup()
    assert stage._types.shape == (11, 768) and len(stage._types.unique(dim=0)) == 11
    pictures = stage._clip.embed_pictures(real)
    stage._types = stage._types.clone()
    stage._types[7] = torch.nn.functional.normalize(pictures.mean(dim=0), dim=0)  # synthetic
    (clip,) = stage.process(task_of(real)).data
    assert clip.kept and "type:synthetic" in clip.record.tags
    assert 1 / 11 < clip.record.scores["video_type_probability"] <= 1
    stage.config = replace(stage.config, video_types_rejected=("synthetic",))
    assert stage.process(task_of(real)).data[0].record.rejected_reason.startswith("of type synthetic")


def test_models_that_are_not_there_are_user_errors(config: CurationConfig, tmp_path: Path) -> None:
    nowhere = str(tmp_path)
    with pytest.raises(UserError, match="clip_model"):
        VideoTypeStage(config=replace(config, clip_model=nowhere)).setup()
    with pytest.raises(UserError, match="aesthetic_model"):
        load_head(nowhere)


def test_stages_are_in_the_pipeline_where_asked_for(config: CurationConfig) -> None:
    def names(**settings: object) -> list[str]:
        stage = CurateClips(input_dir="in", output_dir="out", config=replace(config, **settings))
        return [s.name for s in stage.decompose()]

    assert "quality" in names() and "quality" not in names(quality=False)
    everything = names(overlay_text_max_area=0.02, aesthetic_min=3.5, video_types=True)
    assert everything[4:8] == ["quality", "overlay_text", "aesthetic_filter", "video_type"]
    assert not {"overlay_text", "aesthetic_filter", "video_type"} & set(names())


def test_samples_are_pictures_of_the_source(tmp_path: Path, config: CurationConfig) -> None:
    from curator_stages.stages.reader import plan_spans
    from curator_stages.stages.shot_split import ShotSplitStage
    from nemo_cosmos.video_io import write_video

    write_video(tmp_path / "v.mp4", moving_texture(20, seed=1, height=96, width=160), fps=10)
    (span,) = plan_spans(tmp_path, None, config)
    stage = ShotSplitStage(config=replace(config, max_s=1.0))
    stage.setup()
    clips = stage._split(span)
    assert [len(clip.samples) for clip in clips] == [2, 2]  # one each half second, as long as the shortest clip
    assert clips[0].samples[0].shape == (96, 160, 3)
    stage.config = replace(config, quality=False)
    assert not stage._split(span)[0].samples

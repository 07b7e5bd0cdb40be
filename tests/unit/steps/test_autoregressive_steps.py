"""Generation and evaluation by an autoregressive WFM, from files to files."""

import numpy as np
import pytest

from nemo_cosmos.checkpoints import embedded
from nemo_cosmos.contracts import GeneratedVideo
from nemo_cosmos.data.latent_cache import LatentCacheConfig
from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation import perceptual
from nemo_cosmos.evaluation.token_models import BIGRAM, PREVIOUS_FRAME, UNIGRAM
from nemo_cosmos.files import read_json
from nemo_cosmos.generation.layout import GenerationLayout
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.steps import generate as step
from nemo_cosmos.steps.evaluate_wfm import CEILING, MODEL, REPEAT, SHUFFLED, evaluate_wfm
from nemo_cosmos.steps.tokenize import tokenize
from nemo_cosmos.video_io import read_video, write_video
from tests.unit.generation.small_autoregressive import WITH_ACTIONS, write_small

NO_GUARDS = step.GuardConfig(prompt=(), video=())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoint and tokenizer of a model with all conditions."""
    with initialize():
        return write_small(tmp_path_factory.mktemp("with_actions"), **WITH_ACTIONS)


def test_a_video_goes_on_from_another_and_its_record_tells_how(files, tmp_path):
    write_video(tmp_path / "given.mp4", np.random.default_rng(0).integers(0, 255, (12, 16, 24, 3), np.uint8), fps=10)
    np.save(tmp_path / "actions.npy", np.zeros((24, 7), np.float32))
    checkpoint, tokenizer = map(str, files)
    record = step.generate(
        tmp_path / "a.mp4",
        prompt="A car drives along a street.",
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        first_frame=tmp_path / "given.mp4",
        num_first_frames=9,
        actions=tmp_path / "actions.npy",
        sampling=SamplingConfig(num_frames=25, height=16, width=24, overlap_frames=9, top_k=5, seed=2),
        guards=NO_GUARDS,
        offload=True,
    )
    assert read_video(tmp_path / "a.mp4")[0].shape == (25, 16, 24, 3)
    told = GeneratedVideo.from_dict(read_json(tmp_path / "a.json"))
    assert told == record
    assert (told.temperature, told.top_p, told.top_k, told.speculation) == (1.0, 0.8, 5, "previous_frame")
    assert (told.chunk_frames, told.overlap_frames, told.fps) == (17, 9, 10.0)
    assert told.num_steps is None and told.sampler is None and told.guidance is None


def test_a_model_without_text_is_given_no_prompt(tmp_path):
    with initialize():
        checkpoint, tokenizer = map(str, write_small(tmp_path / "plain"))
    write_video(tmp_path / "given.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps=10)
    given = {
        "checkpoint": checkpoint,
        "tokenizer": tokenizer,
        "first_frame": tmp_path / "given.mp4",
        "sampling": SamplingConfig(num_frames=9, height=16, width=16, temperature=0.0),
    }
    record = step.generate(tmp_path / "a.mp4", **given, guards=step.GuardConfig(video=()))
    assert record.prompt == "" and record.guard == {}
    with pytest.raises(UserError, match=f"prompt: got 'A car.', expected none, for {checkpoint} takes no text"):
        step.generate(tmp_path / "b.mp4", prompt="A car.", **given, guards=NO_GUARDS)
    assert not (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampling": SamplingConfig(guidance=2.0)}, "guidance: got 2.0, expected none, for an autoregressive WFM"),
        ({"layout": GenerationLayout(pipeline=2)}, "layout: got {'pipeline': 2}, expected tensor alone"),
        ({"checkpoint": "diffusion_tiny_action", "sampling": SamplingConfig(top_p=0.5)}, "top_p: got 0.5, .*diffusion"),
    ],
)
def test_what_the_other_family_takes_is_refused_before_anything_is_loaded(files, tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(step, "open_world_model", lambda *_, **__: pytest.fail("a model was loaded"))
    given = {"checkpoint": str(files[0]), "tokenizer": str(files[1]), **given}
    with pytest.raises(UserError, match=message):
        step.generate(tmp_path / "a.mp4", prompt="A car.", guards=NO_GUARDS, **given)


def test_a_tokenizer_of_the_other_kind_is_refused(files, tmp_path):
    given = {"prompt": "A car.", "checkpoint": str(files[0]), "guards": NO_GUARDS}
    with pytest.raises(UserError, match="was trained on latents of tokenizer .* Give the one it was trained with"):
        step.generate(tmp_path / "a.mp4", tokenizer="tokenizer_tiny", **given)


def test_embedded_weights_that_are_missing_are_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    for name in ("autoregressive_tiny_action", "tokenizer_tiny_discrete"):
        with pytest.raises(UserError, match=f"checkpoint {name}: its embedded weights are missing, expected at"):
            embedded.find_checkpoint(name)


class _Brightness:
    """A measure of frames that needs no weights."""

    def frames(self, truth, videos):
        return np.stack([video.mean(axis=(1, 2, 3)) for video in videos])


def test_an_autoregressive_wfm_is_measured_in_pixels_and_in_bits(files, curated, tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "LpipsLike", _Brightness)
    checkpoint, tokenizer = map(str, files)
    window = LatentCacheConfig(num_frames=17, height=16, width=24)
    tokenize(curated, tmp_path / "tokens", tokenizer=tokenizer, config=window)
    sampling = SamplingConfig(height=16, width=24)
    given = {"checkpoint": checkpoint, "tokenizer": tokenizer, "sampling": sampling, "num_clips": 2}
    means = evaluate_wfm(curated, tmp_path / "out", latents=tmp_path / "tokens", **given)
    in_pixels, in_bits = (MODEL, SHUFFLED, REPEAT, CEILING), (MODEL, SHUFFLED, UNIGRAM, BIGRAM, PREVIOUS_FRAME)
    assert set(means) == {*in_pixels, *in_bits}
    assert all("PSNR" in means[name] for name in in_pixels) and all("bits per token" in means[name] for name in in_bits)
    # Weights are random, the vocabulary has 64 codes, and a few hundred tokens were counted.
    assert means[UNIGRAM]["bits per token"] < 6 < means[MODEL]["bits per token"]
    bits = read_json(tmp_path / "out" / "token_bits.json")
    assert (bits["num_frames"], bits["skip_frames"], bits["methods"][0]["measures"][0]["frames"]) == (3, 1, [1, 2])
    differences = read_json(tmp_path / "out" / "differences.json")
    assert differences[UNIGRAM].keys() == {"bits per token"}
    assert differences[SHUFFLED].keys() == {"PSNR", "SSIM", "LPIPS-like", "bits per token"}
    assert evaluate_wfm(curated, tmp_path / "without", **given).keys() == set(in_pixels)
    with pytest.raises(UserError, match="latents: got .*, expected none, for a diffusion WFM has no tokens"):
        evaluate_wfm(curated, tmp_path / "other", latents=tmp_path / "tokens")
    tokenize(curated, tmp_path / "latents", config=window)
    with pytest.raises(UserError, match="tokenizer of .*latents: got .*, with which small was trained"):
        evaluate_wfm(curated, tmp_path / "other", latents=tmp_path / "latents", **given)

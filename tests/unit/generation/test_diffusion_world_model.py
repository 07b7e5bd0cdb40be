import contextlib
import dataclasses
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion.config import diffusion_tiny
from nemo_cosmos.diffusion.model import CosmosDiT
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.errors import UserError
from nemo_cosmos.generation import loading
from nemo_cosmos.generation import open as opening
from nemo_cosmos.generation.diffusion_world_model import DiffusionWorldModel
from nemo_cosmos.generation.first_frames import read_first_frames
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.generation.stage import Stage
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from nemo_cosmos.video_io import to_model, write_video
from tests.unit.generation.word_encoder import WordEncoder

SAMPLING = SamplingConfig(num_frames=17, height=32, width=48, num_steps=3, sampler="euler")


def _world_model(*, action_dim):
    torch.manual_seed(0)
    tokenizer = CausalVideoTokenizer(TokenizerConfig(channels=8, num_res_blocks=1)).eval()
    network = CosmosDiT(diffusion_tiny(num_layers=2, action_dim=action_dim)).eval()
    # Fresh adaptive norms gate everything to zero; random ones let every condition through.
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    card = CheckpointCard(
        model="test",
        config={},
        step=0,
        data="none",
        command="none",
        tokenizer_fingerprint=tokenizer.fingerprint(),
        latent_mean=(0.1,) * 16,
        latent_std=(0.5,) * 16,
    )
    return DiffusionWorldModel(
        config=network.config,
        network=Stage.of(network),
        tokenizer=Stage.of(tokenizer),
        text_encoder=Stage.of(WordEncoder()),
        card=card,
        edm=EDM(),
    )


@pytest.fixture(scope="module")
def model():
    with initialize():
        yield _world_model(action_dim=None)


@pytest.fixture(scope="module")
def action_model(model):
    return _world_model(action_dim=7)


@pytest.fixture(scope="module")
def first_frames():
    return np.random.default_rng(0).integers(0, 255, (1, 32, 48, 3), dtype=np.uint8)


def test_a_video_has_the_size_asked_for_and_depends_on_seed_and_prompt(model):
    videos = [
        model.generate([prompt], SAMPLING, seeds=[seed])[0]
        for prompt, seed in (("a car", 0), ("a car", 0), ("a car", 1), ("an elephant walks", 0))
    ]
    assert videos[0].shape == (17, 32, 48, 3)
    assert videos[0].dtype == np.uint8
    assert (videos[0] == videos[1]).all()
    assert (videos[0] != videos[2]).any()
    assert (videos[0] != videos[3]).any()


def test_everything_runs_where_the_network_is(model, first_frames, monkeypatch):
    there = _world_model(action_dim=7)
    for stage in (there.network, there.tokenizer):
        stage.use(lambda part: part).to("meta")
    # Tensors of other devices do not mix with those on "meta", which know no autocast and hold no values to bring back.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    sampling = dataclasses.replace(SAMPLING, sampler="heun", guidance=2.0)
    actions = np.zeros((1, 16, 7), np.float32)
    video = there.generate(["a car"], sampling, first_frames=[first_frames], actions=actions)[0]
    assert video.shape == (17, 32, 48, 3)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", None), ("cuda", torch.bfloat16)])
def test_parts_are_opened_on_this_ranks_device(model, monkeypatch, device, dtype):
    device, stored, network, tokenizer, encoder = torch.device(device), Mock(card=model.card), Mock(), Mock(), Mock()
    stored.config.return_value = model.config
    stored.load.return_value = network
    network.to.return_value = network
    monkeypatch.setattr(opening, "initialize", lambda **_: contextlib.nullcontext())
    for module in (opening, loading):
        monkeypatch.setattr(module, "current_device", lambda: device)
    monkeypatch.setattr(opening, "find_checkpoint", Path)
    monkeypatch.setattr(opening, "find_network", lambda _: stored)
    monkeypatch.setattr(opening, "load_tokenizer", lambda _: Mock(model=tokenizer))
    monkeypatch.setattr(opening, "load_text_encoder", lambda _: encoder)
    tokenizer.to.return_value = model.tokenizer.use(lambda part: part)
    with opening.open_world_model("a", "b") as opened:
        assert opened.network.use(lambda part: part) is network
        assert opened.text_encoder.use(lambda part: part) is encoder.to.return_value
    assert network.to.call_args_list == [call(dtype=dtype), call(device)]
    tokenizer.to.assert_called_once_with(device)
    encoder.to.assert_called_once_with(device)


@pytest.mark.parametrize(
    ("named", "width", "found"),
    [("b", 4, "b"), (None, 8, "c"), (None, 4, None), (None, 5, None), ("c", 4, None), ("d", 4, None)],
)
def test_the_card_names_the_text_encoder_else_its_width_does(model, monkeypatch, named, width, found):
    encoders = {"a": 4, "b": 4, "c": 8}
    monkeypatch.setattr(loading, "TEXT_ENCODERS", {name: Mock(dim=dim) for name, dim in encoders.items()})
    card = dataclasses.replace(model.card, text_encoder=named)
    if found is None:
        with pytest.raises(UserError, match=f"text encoder of test.*{width} wide.*card.json as text_encoder"):
            loading.text_encoder_of(card, width)
    else:
        assert loading.text_encoder_of(card, width) == found


def test_latents_are_denormalised_frame_by_frame(model):
    """The tokenizer is causal: another mean of the third latent frame changes the video from its tenth frame on."""
    whole = model.generate(["a car"], SAMPLING)[0]
    same, other = (
        dataclasses.replace(
            model, card=dataclasses.replace(model.card, latent_mean=(0.1, 0.1, third) * 16, latent_std=(0.5,) * 48)
        ).generate(["a car"], SAMPLING)[0]
        for third in (0.1, 0.9)
    )
    assert (same == whole).all()
    assert (other[:9] == whole[:9]).all()
    assert (other[9:] != whole[9:]).any()


def test_statistics_of_too_few_frames_are_refused_before_sampling(model, monkeypatch):
    card = dataclasses.replace(model.card, latent_mean=(0.1,) * 32, latent_std=(0.5,) * 32)
    monkeypatch.setattr(DiffusionWorldModel, "_text", lambda *_: pytest.fail("sampling has begun"))
    with pytest.raises(UserError, match="latent statistics of test: got 'statistics of 2 latent frames', .*at least 3"):
        dataclasses.replace(model, card=card).generate(["a car"], SAMPLING)


def test_a_generated_picture_has_the_statistics_of_pictures(model):
    sampling = dataclasses.replace(SAMPLING, num_frames=1)
    card = dataclasses.replace(model.card, image_latent_mean=(0.9,) * 16, image_latent_std=(0.5,) * 16)
    of_pictures = dataclasses.replace(model, card=card)
    assert (of_pictures.generate(["a car"], sampling)[0] != model.generate(["a car"], sampling)[0]).any()
    assert (of_pictures.generate(["a car"], SAMPLING)[0] == model.generate(["a car"], SAMPLING)[0]).all()


def test_a_batch_changes_nothing(model):
    alone = model.generate(["a car"], SAMPLING, seeds=[5])[0].astype(int)
    together = model.generate(["an arm", "a car"], SAMPLING, seeds=[4, 5])[1].astype(int)
    assert np.abs(alone - together).max() <= 1


def test_the_given_frame_comes_back_as_the_tokenizer_holds_it(model, first_frames):
    video = model.generate(["a car"], SAMPLING, first_frames=[first_frames])[0]
    with torch.inference_mode():
        alone = model.tokenizer.use(lambda tokenizer: tokenizer(to_model(first_frames)[None]))[0]
    expected = alone.clamp(-1, 1).add(1).mul(127.5).round().permute(1, 2, 3, 0).numpy()
    # The latent passes through float32 normalisation and back, so a pixel may round the other way.
    assert np.abs(video[:1] - expected).max() <= 1


def test_actions_change_only_what_follows_them(action_model, first_frames):
    actions = np.zeros((1, 16, 7), np.float32)
    late = actions.copy()
    late[0, 8:, 0] = 1.0
    still, moved = (
        action_model.generate(["a car"], SAMPLING, first_frames=[first_frames], actions=a)[0] for a in (actions, late)
    )
    assert (still[0] == moved[0]).all()
    assert (still[9:] != moved[9:]).any()


def test_guidance_moves_away_from_the_unconditional_branch(model, first_frames):
    videos = [
        model.generate(["a car"], dataclasses.replace(SAMPLING, guidance=g), first_frames=[first_frames])[0]
        for g in (0.0, 3.0)
    ]
    assert (videos[0] != videos[1]).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 16}, "num_frames: got 16.*nearest is 17"),
        ({"width": 0}, "height, width"),
        ({"height": 4000}, "latent size T, H, W: got .*at most"),
        ({"num_steps": 0}, "num_steps: got 0"),
        ({"sigma_min": 90.0}, "sigma_min, sigma_max"),
    ],
)
def test_impossible_values_are_refused_before_anything_is_encoded(model, monkeypatch, values, message):
    monkeypatch.setattr(DiffusionWorldModel, "_text", lambda *_: pytest.fail("a prompt was encoded"))
    with pytest.raises(UserError, match=message):
        model.generate(["a car"], dataclasses.replace(SAMPLING, **values))


def test_conditions_that_do_not_fit_the_model_are_refused(model, action_model, first_frames):
    actions = np.zeros((1, 16, 7), np.float32)
    with pytest.raises(UserError, match="no actions for test"):
        model.generate(["a car"], SAMPLING, actions=actions)
    with pytest.raises(UserError, match="actions for test"):
        action_model.generate(["a car"], SAMPLING, first_frames=[first_frames])
    with pytest.raises(UserError, match=r"expected \[1, 16, 7\]"):
        action_model.generate(["a car"], SAMPLING, first_frames=[first_frames], actions=actions[:, :8])
    with pytest.raises(UserError, match=r"actions: got \(1, 16, 6\), expected .*7\].* Give one row of seven numbers"):
        action_model.generate(["a car"], SAMPLING, first_frames=[first_frames], actions=actions[..., :6])
    with pytest.raises(UserError, match=r"prompts, seeds: got \(2, 1\), expected one or more, and as many"):
        model.generate(["a car", "an arm"], SAMPLING, seeds=[1])
    with pytest.raises(UserError, match=r"prompts, seeds: got \(0, 0\)"):
        model.generate([], SAMPLING)
    with pytest.raises(UserError, match="one entry per prompt"):
        model.generate(["a car", "an arm"], SAMPLING, first_frames=[first_frames])


def test_another_tokenizer_is_refused(model):
    with pytest.raises(UserError, match="was trained on latents of tokenizer"):
        dataclasses.replace(model, card=dataclasses.replace(model.card, tokenizer_fingerprint="other"))


def test_any_size_is_a_cut_of_the_next_whole_tokens(model, first_frames):
    odd = dataclasses.replace(SAMPLING, height=30, width=42)
    video = model.generate(["a car"], odd, first_frames=[first_frames[:, :30, :42]])[0]
    assert video.shape == (17, 30, 42, 3)
    mirrored = np.pad(first_frames[:, :30, :42], ((0, 0), (0, 2), (0, 6), (0, 0)), mode="reflect")
    whole = model.generate(["a car"], SAMPLING, first_frames=[mirrored])[0]
    assert (video == whole[:, :30, :42]).all()


def test_a_long_video_goes_on_from_the_end_of_each_chunk(action_model, first_frames):
    rows = np.random.default_rng(1).normal(size=(1, 32, 7)).astype(np.float32)
    long = dataclasses.replace(SAMPLING, num_frames=33, chunk_frames=17)
    video = action_model.generate(["a car"], long, first_frames=[first_frames], actions=rows)[0]
    assert video.shape == (33, 32, 48, 3)
    first = action_model.generate(["a car"], SAMPLING, first_frames=[first_frames], actions=rows[:, :16])[0]
    assert (video[:17] == first).all()
    # The second chunk: its own noise, the actions from the joint on, and the last frame of the first chunk.
    later = rows.copy()
    later[0, 16:, 0] += 1.0
    moved = action_model.generate(["a car"], long, first_frames=[first_frames], actions=later)[0]
    assert (moved[:17] == video[:17]).all() and (moved[17:] != video[17:]).any()
    again = action_model.generate(["a car"], SAMPLING, first_frames=[video[16:17]], actions=rows[:, 16:])[0]
    assert (again[1:] != video[17:]).any()


def test_each_chunk_is_given_the_overlap(model, first_frames, monkeypatch):
    given = []
    sample = DiffusionWorldModel._sample

    def noting(self, batch, chunk, frames):
        given.append(frames)
        return sample(self, batch, chunk, frames)

    monkeypatch.setattr(DiffusionWorldModel, "_sample", noting)
    long = dataclasses.replace(SAMPLING, num_frames=33, chunk_frames=17, overlap_frames=9)
    video = model.generate(["a car"], long, first_frames=[first_frames])[0]
    assert [len(frames[0]) for frames in given] == [1, 9, 9]
    assert (given[1][0] == video[8:17]).all() and (given[2][0] == video[16:25]).all()


def test_a_model_that_takes_no_frames_makes_no_long_videos(model):
    blind = dataclasses.replace(model, config=diffusion_tiny(num_layers=2, concat_condition_mask=False))
    with pytest.raises(UserError, match="chunk_frames: .*no condition-mask channel"):
        blind.generate(["a car"], dataclasses.replace(SAMPLING, num_frames=33, chunk_frames=17))


def test_latent_statistics_may_differ_from_frame_to_frame(model):
    per_frame = dataclasses.replace(model.card, latent_mean=(0.1, 0.1, 0.1) * 16, latent_std=(0.5, 0.5, 0.5) * 16)
    framed = dataclasses.replace(model, card=per_frame)
    video = framed.generate(["a car"], SAMPLING)[0]
    assert (video == model.generate(["a car"], SAMPLING)[0]).all()
    darker = dataclasses.replace(per_frame, latent_mean=(0.1, 0.1, 5.0) * 16)
    changed = dataclasses.replace(model, card=darker).generate(["a car"], SAMPLING)[0]
    assert (changed[:9] == video[:9]).all() and (changed[9:] != video[9:]).any()
    with pytest.raises(UserError, match="statistics of 3 latent frames.*at least 4"):
        framed.generate(["a car"], dataclasses.replace(SAMPLING, num_frames=25))


def test_a_model_has_defaults_of_its_own_for_what_is_not_set(model):
    video = model.generate(["a car"], SamplingConfig(height=32, width=32))[0]
    assert video.shape == (17, 32, 32, 3)


def test_first_frames_are_the_last_of_a_video(tmp_path):
    frames = np.repeat(np.arange(0, 250, 25, dtype=np.uint8)[:, None, None, None], 3, 3).repeat(32, 1).repeat(48, 2)
    write_video(tmp_path / "a.mp4", frames, fps=10)

    def read(name="a.mp4", num_frames=1, fps=10.0):
        return read_first_frames(tmp_path / name, num_frames=num_frames, fps=fps, height=32, width=48)

    last = read()
    assert last.shape == (1, 32, 48, 3)
    assert abs(int(last.mean()) - 225) <= 3
    # At the generated rate: every second or third frame, and all of a video whose rate is the same but for rounding.
    for fps, values in ((10.05, [175, 200, 225]), (5.0, [125, 175, 225]), (4.0, [100, 175, 225])):
        assert np.abs(read(num_frames=3, fps=fps).mean((1, 2, 3)) - values).max() <= 3
    assert len(read(fps=24.0)) == 1  # one frame has no rate
    with pytest.raises(UserError, match=r"frames per second of .*a.mp4: got 10.0, expected at least .*24.0"):
        read(num_frames=2, fps=24.0)
    with pytest.raises(UserError, match="at least 11 frames for 11 at 10.0 a second. Give a longer video"):
        read(num_frames=11)
    with pytest.raises(UserError, match="no such video"):
        read("b.mp4")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read("b.png")

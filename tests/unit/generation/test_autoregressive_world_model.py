import dataclasses

import numpy as np
import pytest
import torch

from nemo_cosmos.autoregressive.decode import write_tokens
from nemo_cosmos.autoregressive.token_sampling import TokenSampling
from nemo_cosmos.errors import UserError
from nemo_cosmos.generation import autoregressive_world_model as module
from nemo_cosmos.generation import open as opening
from nemo_cosmos.generation.autoregressive_world_model import AutoregressiveWorldModel
from nemo_cosmos.generation.diffusion_decoder import DecodingConfig
from nemo_cosmos.generation.layout import GenerationLayout
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.generation.stage import Stage
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.transformer.actions import scaled_actions
from nemo_cosmos.video_io import to_model, to_pixels
from tests.unit.generation.small_autoregressive import (
    WITH_ACTIONS,
    card_of,
    small_network,
    small_tokenizer,
    write_small,
)
from tests.unit.generation.test_diffusion_decoder import decoder
from tests.unit.generation.word_encoder import WordEncoder

SAMPLING = SamplingConfig(num_frames=17, height=16, width=24)


def _world_model(**fields):
    network, tokenizer = small_network(**fields), small_tokenizer()
    return AutoregressiveWorldModel(
        config=network.config,
        network=Stage.of(network),
        tokenizer=Stage.of(tokenizer),
        text_encoder=Stage.of(WordEncoder()) if "crossattn_emb_channels" in fields else None,
        card=card_of(network, tokenizer),
    )


@pytest.fixture(scope="module")
def model():
    """With text, actions and Medusa heads."""
    with initialize():
        yield _world_model(**WITH_ACTIONS)


@pytest.fixture(scope="module")
def plain_model(model):
    """Without any, nor a token to begin with."""
    return _world_model()


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 255, (9, 16, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def actions():
    return np.random.default_rng(1).normal(size=(1, 48, 7)).astype(np.float32)


@torch.inference_mode()
def test_a_video_is_what_the_tokenizer_makes_of_the_written_tokens(model, frames, actions):
    network, tokenizer = (stage.use(lambda part: part) for stage in (model.network, model.tokenizer))
    for count, latents in ((1, 1), (9, 2)):
        video = model.generate(["a car"], SAMPLING, first_frames=[frames[:count]], actions=actions[:, :16], seeds=[5])
        tokens = torch.full((1, 1 + 3 * 6), -1)
        tokens[:, 0] = model.config.begin_of_video
        tokens[:, 1 : 1 + latents * 6] = tokenizer.encode(to_model(frames[:count])[None]).flatten(1)
        written = write_tokens(
            network,
            tokens,
            (3, 2, 3),
            WordEncoder().encode(["a car"])[0],
            sampling=TokenSampling(temperature=1.0, top_p=0.8),
            seeds=[5],
            actions_BFA=scaled_actions(torch.from_numpy(actions[:, :16])),
        )
        assert (video[0] == to_pixels(tokenizer.decode(written.tokens_BS[:, 1:].view(1, 3, 2, 3))[0])).all()
        given = to_pixels(tokenizer(to_model(frames[:count])[None])[0])
        assert (video[0][:count] == given).all()


def test_a_video_depends_on_its_seed_its_text_its_actions_and_on_how_tokens_are_drawn(model, frames, actions):
    def generate(prompt="a car", seed=0, rows=actions[:, :16], **sampling):
        config = dataclasses.replace(SAMPLING, **sampling)
        return model.generate([prompt], config, first_frames=[frames[:1]], actions=rows, seeds=[seed])[0]

    video = generate()
    assert video.shape == (17, 16, 24, 3)
    for others in (
        {"seed": 1},
        {"prompt": "an elephant walks"},
        {"rows": -actions[:, :16]},
        {"temperature": 0.0},
        {"top_p": 0.1},
        {"top_k": 2},
    ):
        assert (generate(**others) != video).any(), others
    greedy = {"temperature": 0.0}
    assert (generate(**greedy) == generate(seed=1, **greedy)).all()
    assert (generate(top_k=1, top_p=1.0) == generate(**greedy)).all()
    two = model.generate(
        ["an arm", "a car"], SAMPLING, first_frames=[frames[1:2], frames[:1]], actions=actions[:, :16].repeat(2, 0),
        seeds=[4, 0],
    )  # fmt: skip
    assert np.abs(two[1].astype(int) - video).max() <= 1


@pytest.mark.parametrize(("speculation", "guesses"), [("medusa", 2), ("previous_frame", 6)])
def test_speculation_changes_no_video(model, frames, actions, monkeypatch, speculation, guesses):
    drafters = []

    def noting(*args, drafter, **kwargs):
        drafters.append(drafter)
        return write_tokens(*args, drafter=drafter, **kwargs)

    monkeypatch.setattr(module, "write_tokens", noting)
    given = {"first_frames": [frames[:1]], "actions": actions[:, :16], "seeds": [3]}
    plain, quick = (
        model.generate(["a car"], dataclasses.replace(SAMPLING, top_k=2, speculation=way), **given)[0]
        for way in ("none", speculation)
    )
    assert (plain == quick).all()
    assert drafters[0] is None
    assert drafters[1].num_guesses == guesses  # two heads; the six tokens of a frame


def test_compiled_steps_write_the_same(model, frames, actions, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    given = {"first_frames": [frames[:1]], "actions": actions[:, :16], "seeds": [3]}
    plain, same = (
        model.generate(["a car"], dataclasses.replace(SAMPLING, compile=way), **given)[0] for way in (False, True)
    )
    assert (plain == same).all()
    assert len(compiled) == 1


def test_a_model_without_heads_cannot_guess_by_them(plain_model):
    assert SAMPLING.for_autoregressive(plain_model.config).speculation == "previous_frame"
    with pytest.raises(UserError, match="speculation: got 'medusa'.*no Medusa heads"):
        dataclasses.replace(SAMPLING, speculation="medusa").for_autoregressive(plain_model.config)


def test_a_long_video_is_written_window_by_window(model, frames, actions):
    """Each window is given the end of the last one, encoded anew, and its own actions; 17 frames when not told."""
    for overlap in (1, 9):
        rows = actions[:, :32]
        long = dataclasses.replace(SAMPLING, num_frames=33, overlap_frames=overlap, temperature=0.0)
        video = model.generate(["a car"], long, first_frames=[frames[:1]], actions=rows)[0]
        assert video.shape == (33, 16, 24, 3)
        window, given, start = video[:0], frames[:1], 0
        while len(window) < 33:
            config = dataclasses.replace(SAMPLING, temperature=0.0)
            following = model.generate(
                ["a car"], config, first_frames=[given], actions=rows[:, start : start + 16]
            )[0]  # fmt: skip
            window = np.concatenate([window, following[len(given) if len(window) else 0 :]])
            given, start = window[-overlap:], len(window) - overlap
        assert (window == video).all()


def test_windows_of_a_video_draw_each_for_itself(plain_model, frames, monkeypatch):
    """Places are counted from the video's start: latent frames 3 and 4 of the second window."""
    first_places = []

    def noting(*args, first_place, **kwargs):
        first_places.append(first_place)
        return write_tokens(*args, first_place=first_place, **kwargs)

    monkeypatch.setattr(module, "write_tokens", noting)
    still = np.repeat(frames[:1], 17, axis=0)
    monkeypatch.setattr(AutoregressiveWorldModel, "_decode", lambda self, tokens, request: [still])
    config = dataclasses.replace(SAMPLING, num_frames=41, top_p=1.0)
    plain_model.generate([""], config, first_frames=[frames[:1]])
    assert first_places == [0, 2 * 6, 4 * 6]
    # From the same frame with the same seed, as what was decoded is set aside here.
    tokens = [
        write_tokens(
            plain_model.network.use(lambda part: part),
            torch.cat([torch.zeros(1, 6, dtype=torch.int64), torch.full((1, 12), -1)], dim=1),
            (3, 2, 3),
            sampling=TokenSampling(temperature=5.0, top_p=None),
            seeds=[0],
            first_place=place,
        ).tokens_BS
        for place in (0, 12)
    ]
    assert (tokens[0] != tokens[1]).any()


def test_a_diffusion_decoder_makes_the_frames(plain_model, frames, monkeypatch):
    written = []

    def noting(self, tokens, request):
        written.append(tokens)
        return decode(self, tokens, request)

    decode = AutoregressiveWorldModel._decode
    monkeypatch.setattr(AutoregressiveWorldModel, "_decode", noting)
    fingerprint = plain_model.tokenizer.use(lambda tokenizer: tokenizer.fingerprint())
    drawn_by = decoder(1, num_codes=64, token_fingerprint=fingerprint)
    model = dataclasses.replace(plain_model, diffusion_decoder=drawn_by)
    config = dataclasses.replace(SAMPLING, num_frames=9, fps=12.0)
    video = model.generate([""], config, first_frames=[frames[:1]], seeds=[3])[0]
    expected = drawn_by.decode(written[0], DecodingConfig(fps=12.0), seeds=[3])[0]
    assert (video[1:] == to_pixels(expected)[1:]).all()
    with pytest.raises(UserError, match="takes tokens of tokenizer other"):
        dataclasses.replace(plain_model, diffusion_decoder=decoder(1, num_codes=64, token_fingerprint="other"))


def test_any_size_is_a_cut_of_the_next_whole_tokens(plain_model, frames):
    odd = dataclasses.replace(SAMPLING, height=14, width=18, num_frames=9)
    video = plain_model.generate([""], odd, first_frames=[frames[:1, :14, :18]])[0]
    assert video.shape == (9, 14, 18, 3)
    mirrored = np.pad(frames[:1, :14, :18], ((0, 0), (0, 2), (0, 6), (0, 0)), mode="reflect")
    whole = plain_model.generate([""], dataclasses.replace(SAMPLING, num_frames=9), first_frames=[mirrored])[0]
    assert (video == whole[:, :14, :18]).all()


def test_a_model_with_a_token_to_begin_with_needs_no_frame(model, actions):
    videos = [model.generate(["a car"], SAMPLING, actions=actions[:, :16], seeds=[s])[0] for s in (0, 1)]
    assert (videos[0][0] != videos[1][0]).any()


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ({"num_frames": 16}, {}, "num_frames: got 16.*nearest is 17"),
        ({"width": 0}, {}, "height, width"),
        ({"chunk_frames": 16}, {}, "chunk_frames: got 16"),
        ({"overlap_frames": 17}, {}, "1 <= overlap_frames < chunk_frames"),
        ({"guidance": 0.0}, {}, "guidance: got 0.0, expected none, for an autoregressive WFM denoises nothing"),
        ({"input_frames_guidance": True}, {}, "input_frames_guidance: got True, expected none"),
        ({}, {"negative_prompt": "rain"}, "negative_prompt: got 'rain', expected none"),
        ({}, {"first_frames": 2}, r"first frames: got \[2\], expected the same count for all videos, 1 \+ k \* 8"),
        ({"num_frames": 9}, {"first_frames": 9}, r"first frames: got \[9\].*below 9"),
        ({}, {"actions": 8}, r"actions: got \(1, 8, 7\), expected \[1, 16, 7\]"),
        ({}, {"actions": None}, "actions: got False, expected actions for small"),
    ],
)
def test_impossible_values_are_refused_before_anything_is_encoded(
    model, frames, actions, monkeypatch, values, given, message
):
    monkeypatch.setattr(AutoregressiveWorldModel, "_text", lambda *_: pytest.fail("a prompt was encoded"))
    given = {"first_frames": 1, "actions": 16, **given}
    given["first_frames"] = [frames[: given["first_frames"]]]
    given["actions"] = given["actions"] and actions[:, : given["actions"]]
    with pytest.raises(UserError, match=message):
        model.generate(["a car"], dataclasses.replace(SAMPLING, **values), **given)


def test_what_a_plain_model_does_not_take_is_refused(plain_model, frames, actions):
    with pytest.raises(UserError, match="first frames: got None, expected 1 or more, for small has no token to begin"):
        plain_model.generate([""], SAMPLING)
    with pytest.raises(UserError, match="prompt: got 'a car', expected none, for small takes no text"):
        plain_model.generate(["a car"], SAMPLING, first_frames=[frames[:1]])
    with pytest.raises(UserError, match="no actions for small"):
        plain_model.generate([""], SAMPLING, first_frames=[frames[:1]], actions=actions)


def test_only_the_tokenizer_of_its_training_is_taken(model):
    with pytest.raises(UserError, match="was trained on latents of tokenizer"):
        dataclasses.replace(model, card=dataclasses.replace(model.card, tokenizer_fingerprint="other"))
    with pytest.raises(UserError, match="its card lacks the tokenizer. Convert it again with --tokenizer"):
        dataclasses.replace(model, card=dataclasses.replace(model.card, tokenizer_fingerprint=None))
    with pytest.raises(UserError, match="codes of the tokenizer: got 64, expected 50"):
        dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=50))


def test_bits_are_those_of_the_networks_own_probabilities(model, frames, actions):
    videos = [np.concatenate([frames, frames[1:]]), np.concatenate([frames[::-1], frames[1:]])]
    tokens, rows = model.tokenize(videos), actions[:, :32].reshape(2, 16, 7)
    bits = model.token_bits(tokens, ["a car", ""], rows)
    network = model.network.use(lambda part: part)
    with torch.inference_mode():
        sequence = torch.cat([torch.full((2, 1), model.config.begin_of_video), tokens.flatten(1)], dim=1)
        text, moves = WordEncoder().encode(["a car", ""])[0], scaled_actions(torch.from_numpy(rows))
        logits = network(sequence, (3, 2, 3), text, actions_BFA=moves)[:, 6:-1]
        expected = -torch.log2(logits.double().softmax(-1).gather(-1, sequence[:, 7:, None])).view(2, 2, 2, 3)
    # float32, of some ten bits.
    np.testing.assert_allclose(bits, expected.numpy(), atol=1e-4)


def test_files_and_folders_are_opened_by_the_same_road(model, frames, actions, tmp_path, monkeypatch):
    checkpoint, tokenizer = write_small(tmp_path, **WITH_ACTIONS)
    monkeypatch.setattr(opening, "load_text_encoder", lambda name: _Moved())
    given = {"first_frames": [frames[:1]], "actions": actions[:, :16]}
    expected = model.generate(["a car"], SAMPLING, **given)[0]
    with opening.open_world_model(checkpoint, tokenizer) as opened:
        assert (opened.generate(["a car"], SAMPLING, **given)[0] == expected).all()
    with (
        pytest.raises(UserError, match="layout: got {'context': 2}, expected tensor alone"),
        opening.open_world_model(checkpoint, tokenizer, layout=GenerationLayout(context=2)),
    ):
        pass
    with (
        pytest.raises(UserError, match="checkpoint tokenizer_none: neither a folder nor embedded"),
        opening.open_world_model(checkpoint, "tokenizer_none"),
    ):
        pass


class _Moved(WordEncoder):
    def to(self, device):
        return self

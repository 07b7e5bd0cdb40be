from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.causal_cache import CausalCache
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.layers import causal_mask
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from nemo_cosmos.tokenizer.streaming import (
    CodedVideo,
    StreamingEncoder,
    decode_frames,
    decode_stream,
    decode_video,
    encode_stream,
    encode_video,
)
from nemo_cosmos.video_io import to_model, to_pixels
from tests.unit.tokenizer.conftest import DISCRETE, ODD, TINY, random_tokenizer
from tests.unit.tokenizer.live_memory import LiveMemory

SMALL = {"channels": 8, "channels_mult": (1, 2, 2), "num_res_blocks": 1, "latent_channels": 4}
CONFIGS = {
    "p4 t8 s8": TINY,
    "p2 t4 s8": ODD,
    "p8 t8 s8": TokenizerConfig(**SMALL | {"channels_mult": (1, 2)}, patch_size=8),
    "p2 t8 s8": TokenizerConfig(**SMALL | {"channels_mult": (1, 2, 1, 2)}, patch_size=2),
    "p4 t8 s16": TokenizerConfig(**SMALL, spatial_compression=16),
    "p4 t4 s16": TokenizerConfig(**SMALL, spatial_compression=16, temporal_compression=4),
    "p2 t4 s4 rearrange": TokenizerConfig(
        **SMALL, patch_size=2, patch_method="rearrange", spatial_compression=4, temporal_compression=4
    ),
}
CHUNKINGS = [(5,), (1, 1, 1, 1, 1), (1, 4), (2, 3), (4, 1), (2, 1, 2)]
"""Latent frames per chunk."""
TOLERANCE = 1e-5


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def tokenizer(request: pytest.FixtureRequest) -> CausalVideoTokenizer:
    return calm(random_tokenizer(request.param))


@pytest.fixture
def small() -> CausalVideoTokenizer:
    return calm(random_tokenizer(CONFIGS["p8 t8 s8"]))


def calm(tokenizer: CausalVideoTokenizer) -> CausalVideoTokenizer:
    """Wavelets sum patch_size^3 coefficients to a pixel; this keeps pixels in the range of a trained model's."""
    config = tokenizer.tokenizer_config
    for parameter in tokenizer.decoder.conv_out[1].parameters():
        parameter.data.mul_(0.5 / config.patch_size**1.5 if config.patch_method == "haar" else 0.5)
    return tokenizer


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def frame_counts(config: TokenizerConfig, chunking: tuple[int, ...]) -> list[int]:
    """Frames per chunk for latent frames per chunk."""
    step = config.temporal_compression
    return [1 + (chunking[0] - 1) * step, *(length * step for length in chunking[1:])]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


def test_encoding_in_chunks_equals_one_pass(tokenizer: CausalVideoTokenizer) -> None:
    config = tokenizer.tokenizer_config
    video = noise(2, 3, 1 + 4 * config.temporal_compression, 32, 48)
    with torch.no_grad():
        expected = tokenizer.encode(video)
    assert expected.abs().max() > 0.1
    for chunking in CHUNKINGS:
        latents = list(encode_stream(tokenizer, video.split(frame_counts(config, chunking), dim=2)))
        assert [latent.shape[2] for latent in latents] == list(chunking)
        assert difference(torch.cat(latents, dim=2), expected) <= TOLERANCE, chunking


def test_decoding_in_chunks_equals_one_pass(tokenizer: CausalVideoTokenizer) -> None:
    config = tokenizer.tokenizer_config
    latent = noise(2, config.latent_channels, 5, 2, 3)
    with torch.no_grad():
        expected = tokenizer.decode(latent)
    assert expected.abs().max() > 0.1
    for chunking in CHUNKINGS:
        chunks = list(decode_stream(tokenizer, latent.split(chunking, dim=2)))
        assert [chunk.shape[2] for chunk in chunks] == frame_counts(config, chunking)
        assert difference(torch.cat(chunks, dim=2), expected) <= TOLERANCE, chunking


def test_indices_come_in_chunks_too() -> None:
    tokenizer, video = calm(random_tokenizer(DISCRETE)), noise(1, 3, 30, 40, 24)
    coded = encode_video(tokenizer, video, chunk_frames=8)
    whole = encode_video(tokenizer, video, chunk_frames=64)
    assert coded.latent.dtype == torch.int32
    assert torch.equal(coded.latent, whole.latent)
    rebuilt = decode_video(tokenizer, coded, chunk_frames=8)
    assert rebuilt.shape == video.shape
    assert difference(rebuilt, decode_video(tokenizer, whole, chunk_frames=64)) <= TOLERANCE


def test_a_picture_is_one_chunk(tokenizer: CausalVideoTokenizer) -> None:
    picture = noise(1, 3, 1, 16, 32)
    (latent,) = encode_stream(tokenizer, [picture])
    (rebuilt,) = decode_stream(tokenizer, [latent])
    with torch.no_grad():
        assert torch.equal(latent, tokenizer.encode(picture))
        assert difference(rebuilt, tokenizer.decode(latent)) <= TOLERANCE
    assert not latent.requires_grad and not rebuilt.requires_grad


def test_no_stream_no_result(small: CausalVideoTokenizer) -> None:
    assert list(encode_stream(small, [])) == list(decode_stream(small, [])) == []


def test_a_chunk_is_coded_before_the_next_is_asked_for(small: CausalVideoTokenizer) -> None:
    asked = []

    def chunks() -> Iterator[torch.Tensor]:
        for index, num_frames in enumerate((1, 8, 8)):
            asked.append(index)
            yield noise(1, 3, num_frames, 8, 8)

    stream = decode_stream(small, encode_stream(small, chunks()))
    for index in range(3):
        next(stream)
        assert asked == list(range(index + 1))


def test_streams_of_one_tokenizer_do_not_mix(small: CausalVideoTokenizer) -> None:
    videos = [noise(1, 3, 17, 8, 8, seed=seed) for seed in (1, 2)]
    streams = [encode_stream(small, video.split([9, 8], dim=2)) for video in videos]
    pairs = list(zip(*streams, strict=True))
    for index, video in enumerate(videos):
        latent = torch.cat([pair[index] for pair in pairs], dim=2)
        assert difference(latent, small.encode(video)) <= TOLERANCE


@pytest.mark.parametrize("size", [(1, 5, 3), (2, 16, 16), (9, 33, 17), (20, 15, 40), (27, 8, 8)])
def test_any_size_and_length(tokenizer: CausalVideoTokenizer, size: tuple[int, int, int]) -> None:
    config = tokenizer.tokenizer_config
    num_frames, height, width = size
    video = noise(1, 3, *size)
    missing_t = -(num_frames - 1) % config.temporal_compression
    missing_h, missing_w = -height % config.spatial_compression, -width % config.spatial_compression
    with torch.no_grad():
        latent = tokenizer.encode(F.pad(video, (0, missing_w, 0, missing_h, 0, missing_t), mode="replicate"))
        expected = tokenizer.decode(latent)[:, :, :num_frames, :height, :width]
    for chunk_frames in (8, 16, 64):
        coded = encode_video(tokenizer, video, chunk_frames=chunk_frames)
        assert difference(coded.latent, latent) <= TOLERANCE
        assert (coded.num_frames, coded.height, coded.width) == size
        rebuilt = decode_video(tokenizer, coded, chunk_frames=chunk_frames)
        assert rebuilt.shape == video.shape
        assert difference(rebuilt, expected) <= TOLERANCE


def test_frames_in_and_out(small: CausalVideoTokenizer) -> None:
    frames = pixels(12, 10, 9, 3)
    coded = encode_video(small, frames, chunk_frames=8)
    assert difference(coded.latent, encode_video(small, to_model(frames)[None]).latent) <= TOLERANCE
    rebuilt = decode_frames(small, coded, chunk_frames=8)
    assert rebuilt.dtype == np.uint8 and rebuilt.shape == frames.shape
    assert np.abs(rebuilt.astype(int) - to_pixels(decode_video(small, coded)[0])).max() <= 1
    with pytest.raises(UserError, match="number of videos: got 2"):
        decode_frames(small, encode_video(small, noise(2, 3, 1, 8, 8)))


def test_video_takes_the_type_of_the_weights(small: CausalVideoTokenizer) -> None:
    coded = encode_video(small.bfloat16(), pixels(9, 10, 9, 3), chunk_frames=8)
    assert coded.latent.dtype == torch.bfloat16
    assert decode_frames(small, coded).shape == (9, 10, 9, 3)


def test_windows_are_coded_alone_and_have_seams(tokenizer: CausalVideoTokenizer) -> None:
    config, video = tokenizer.tokenizer_config, noise(1, 3, 40, 16, 16)
    windows = [video[:, :, :17], video[:, :, 17:34], F.pad(video[:, :, 34:], (0, 0, 0, 0, 0, 3), mode="replicate")]
    if config.temporal_compression == 4:
        windows[2] = windows[2][:, :, :9]
    with torch.no_grad():
        latents = [tokenizer.encode(window) for window in windows]
        expected = torch.cat([tokenizer.decode(latent) for latent in latents], dim=2)[:, :, :40]
    causal, coded = encode_video(tokenizer, video), encode_video(tokenizer, video, mode="windows")
    assert coded.window_frames == 17
    assert difference(coded.latent, torch.cat(latents, dim=2)) <= TOLERANCE
    alone, together = decode_video(tokenizer, coded), decode_video(tokenizer, causal)
    assert difference(alone, expected) <= TOLERANCE
    assert difference(alone[:, :, :17], together[:, :, :17]) <= TOLERANCE
    assert difference(alone[:, :, 17:18], together[:, :, 17:18]) > 1e-2


def test_bounded_attention_depends_on_the_bound_and_not_on_the_chunks(tokenizer: CausalVideoTokenizer) -> None:
    latent = noise(1, tokenizer.tokenizer_config.latent_channels, 5, 2, 3)

    def decoded(chunking: tuple[int, ...], bound: int | None) -> torch.Tensor:
        chunks = latent.split(chunking, dim=2)
        return torch.cat(list(decode_stream(tokenizer, chunks, max_attended_frames=bound)), dim=2)

    exact = decoded((5,), None)
    for bound in (1, 2, 3):
        expected = decoded((5,), bound)
        for chunking in CHUNKINGS:
            assert difference(decoded(chunking, bound), expected) <= TOLERANCE
        num_same = 1 + (bound - 1) * tokenizer.tokenizer_config.temporal_compression
        assert difference(expected[:, :, :num_same], exact[:, :, :num_same]) <= TOLERANCE
        assert difference(expected, exact) > 1e-4
    assert difference(decoded((2, 3), 5), exact) <= TOLERANCE


def test_causal_mask() -> None:
    assert causal_mask(2, 4, None).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(2, 4, 2).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def peak_bytes(tokenizer: CausalVideoTokenizer, *, num_latents: int, bound: int | None, decode: bool) -> int:
    """Most bytes of tensors alive while a stream of 8 frames or one latent frame a chunk is coded."""
    config = tokenizer.tokenizer_config
    shape = (1, config.latent_channels, 1, 2, 2) if decode else (1, 3, 8, 16, 16)
    starts = [] if decode else [noise(1, 3, 1, 16, 16)]
    with LiveMemory() as memory:
        chunks = (chunk for part in (starts, (noise(*shape) for _ in range(num_latents))) for chunk in part)
        for _ in (decode_stream if decode else encode_stream)(tokenizer, chunks, max_attended_frames=bound):
            pass
    return memory.peak_bytes


@pytest.mark.parametrize("decode", [False, True])
def test_memory_does_not_follow_the_length(decode: bool) -> None:
    tokenizer = random_tokenizer(CONFIGS["p4 t8 s8"])
    short, long = (peak_bytes(tokenizer, num_latents=length, bound=2, decode=decode) for length in (4, 24))
    assert short == long > 0
    short, long = (peak_bytes(tokenizer, num_latents=length, bound=None, decode=decode) for length in (4, 24))
    # Key and value of 4 pixels, 64 channels and 4 bytes; old and joined ones are alive together for a moment.
    per_latent = 2 * 4 * 64 * 4
    assert 20 * per_latent <= long - short <= 2.2 * 20 * per_latent


def test_memory_of_one_pass_follows_the_length(small: CausalVideoTokenizer) -> None:
    peaks = []
    for length in (4, 24):
        latent = noise(1, 4, length, 2, 2)
        with LiveMemory() as memory, torch.no_grad():
            small.decode(latent)
        peaks.append(memory.peak_bytes)
    assert peaks[1] > 4 * peaks[0]


@pytest.mark.parametrize("bound", [1, 3])
def test_what_is_kept_between_chunks_does_not_follow_their_length(small: CausalVideoTokenizer, bound: int) -> None:
    kept = []
    for length in (4, 16):
        chunks = [noise(1, 4, length, 2, 2), noise(1, 4, 1, 2, 2)]
        with LiveMemory() as memory:
            stream = decode_stream(small, chunks, max_attended_frames=bound)
            next(stream)
            torch.zeros(1)  # the meter looks at the next operation
            kept.append(memory.live_bytes)
    assert kept[0] == kept[1] > 0


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 3, 8, 8, 8)], "number of frames: got 8, expected 1 \\+ a multiple of 8"),
        ([(1, 3, 9, 8, 8), (1, 3, 9, 8, 8)], "number of frames: got 9, expected a multiple of 8.*: 8 or 16"),
        ([(1, 3, 9, 8, 8), (1, 3, 1, 8, 8)], "number of frames: got 1, expected a multiple of 8.*: 8\\."),
        ([(1, 3, 9, 8, 8), (1, 3, 8, 8, 16)], "chunk shape without time.*as before"),
        ([(1, 3, 0, 8, 8)], "chunk shape.*T > 0"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(
    small: CausalVideoTokenizer, shapes: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(encode_stream(small, [torch.zeros(shape) for shape in shapes]))


def test_bad_options_are_refused(small: CausalVideoTokenizer) -> None:
    video = noise(1, 3, 9, 8, 8)
    with pytest.raises(UserError, match="chunk_frames: got 12, expected a multiple of 8"):
        encode_video(small, video, chunk_frames=12)
    with pytest.raises(UserError, match="mode: got 'window'"):
        encode_video(small, video, mode="window")
    with pytest.raises(UserError, match="max_attended_frames: got 0"):
        CausalCache(max_attended_frames=0)
    for bad in (pixels(9, 8, 8, 4), pixels(0, 8, 8, 3), pixels(9, 8, 8, 3) / 255, video[0], video.byte()):
        with pytest.raises(UserError, match="video: got"):
            encode_video(small, bad)


@pytest.mark.parametrize("wrong", [{"num_frames": 10}, {"height": 9}, {"width": 0}])
def test_a_size_beyond_the_latent_is_refused(small: CausalVideoTokenizer, wrong: dict[str, int]) -> None:
    coded = CodedVideo(latent=noise(1, 4, 2, 1, 1), **{"num_frames": 9, "height": 8, "width": 8} | wrong)
    with pytest.raises(UserError, match=f"{next(iter(wrong))}: got .*with this latent"):
        decode_video(small, coded)


def test_the_latent_cache_encodes_long_windows_as_in_one_pass(small):
    video = torch.rand(2, 3, 41, 16, 16) * 2 - 1
    encoder = StreamingEncoder(small)
    with torch.no_grad():
        expected = small.encode(video)
    torch.testing.assert_close(encoder.encode(video), expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(UserError, match="number of frames: got 40"):
        encoder.encode(video[:, :, :40])
    with pytest.raises(UserError, match="chunk_frames: got 12"):
        StreamingEncoder(small, chunk_frames=12)

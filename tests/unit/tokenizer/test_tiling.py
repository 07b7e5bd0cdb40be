import pytest
import torch

from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from nemo_cosmos.tokenizer.streaming import decode_stream, decode_video, encode_stream, encode_video
from nemo_cosmos.tokenizer.tiling import Place, SeamFigure, Tiling, code_tiles, seam_figure
from tests.unit.tokenizer.conftest import random_tokenizer

CONFIG = TokenizerConfig(channels=8, channels_mult=(1, 2), num_res_blocks=1, latent_channels=4, patch_size=8)
TILING = Tiling(tile=32, overlap=16)


@pytest.fixture
def tokenizer() -> CausalVideoTokenizer:
    return random_tokenizer(CONFIG)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (3, [(0, 3)]),
        (4, [(0, 4)]),
        (5, [(0, 4), (1, 5)]),
        (6, [(0, 4), (2, 6)]),
        (7, [(0, 4), (2, 6), (3, 7)]),
        (10, [(0, 4), (2, 6), (4, 8), (6, 10)]),
    ],
)
def test_tiles_cover_an_axis(length: int, expected: list[tuple[int, int]]) -> None:
    assert [(span.start, span.stop) for span in TILING.spans(length, cell=8)] == expected


@pytest.mark.parametrize("overlap", [0, 8, 16, 24])
def test_blended_tiles_of_the_identity_are_the_identity(overlap: int) -> None:
    tiling, places = Tiling(tile=32, overlap=overlap), []

    def identity(tile: torch.Tensor, place: Place) -> torch.Tensor:
        places.append(place)
        return tile

    x = noise(2, 3, 56, 40)
    assert (code_tiles(x, identity, tiling, cell=8, cell_in=8, cell_out=8) - x).abs().max() <= 1e-6
    assert len(places) == len(set(places)) > 3


def test_neighbours_are_blended_linearly() -> None:
    def column_number(tile: torch.Tensor, place: Place) -> torch.Tensor:
        return torch.full((1, 8 * tile.shape[-1]), float(place[1]))

    out = code_tiles(torch.zeros(1, 6), column_number, TILING, cell=8, cell_in=1, cell_out=8)[0]
    assert out[:16].tolist() == [0] * 16 and out[32:].tolist() == [1] * 16
    assert torch.allclose(out[16:32], (torch.arange(16) + 0.5) / 16)


def test_one_tile_is_exact(tokenizer: CausalVideoTokenizer) -> None:
    video = noise(1, 3, 9, 32, 24)
    assert torch.equal(encode_video(tokenizer, video, tiling=TILING).latent, encode_video(tokenizer, video).latent)


def test_tiles_stream_like_one_pass_of_tiles(tokenizer: CausalVideoTokenizer) -> None:
    video = noise(1, 3, 25, 40, 56)
    (latent,) = encode_stream(tokenizer, [video], tiling=TILING)
    assert latent.shape == (1, 4, 4, 5, 7)
    chunks = encode_stream(tokenizer, video.split([1, 16, 8], dim=2), tiling=TILING)
    assert (torch.cat(list(chunks), dim=2) - latent).abs().max() <= 1e-5
    (rebuilt,) = decode_stream(tokenizer, [latent], tiling=TILING)
    assert rebuilt.shape == video.shape
    chunks = decode_stream(tokenizer, latent.split(1, dim=2), tiling=TILING)
    assert (torch.cat(list(chunks), dim=2) - rebuilt).abs().max() <= 1e-5 * rebuilt.abs().max()


def test_the_first_tile_is_coded_alone(tokenizer: CausalVideoTokenizer) -> None:
    video = noise(1, 3, 9, 32, 56)
    latent = encode_video(tokenizer, video, tiling=TILING).latent
    alone = encode_video(tokenizer, video[..., :32]).latent
    assert (latent[..., :2] - alone[..., :2]).abs().max() <= 1e-6


def test_seams_of_a_tiled_result(tokenizer: CausalVideoTokenizer) -> None:
    video = noise(1, 3, 9, 48, 48)
    coded = encode_video(tokenizer, video)
    whole, tiled = (decode_video(tokenizer, coded, tiling=tiling) for tiling in (None, TILING))
    seams = seam_figure(tiled, whole, TILING, cell=8, cell_in=8)
    assert seams.max_abs > seams.mean_abs > 1e-3
    assert seam_figure(whole, whole, TILING, cell=8, cell_in=8) == SeamFigure(max_abs=0.0, mean_abs=0.0)


def test_the_seam_figure_looks_at_the_joints_only() -> None:
    untiled, on_joint, off_joint = torch.zeros(3, 48, 48), torch.zeros(3, 48, 48), torch.zeros(3, 48, 48)
    on_joint[1, 0, 15] = -2.0  # the overlap is 16:32, and one pixel to either side counts
    off_joint[1, 14, 14] = 2.0
    on_joint[1, 14, 14] = 5.0
    figure = seam_figure(on_joint, untiled, TILING, cell=8, cell_in=8)
    num_pixels = 3 * (48**2 - 30**2)
    assert figure.max_abs == 2.0
    assert figure.mean_abs == pytest.approx(2.0 / num_pixels)
    assert seam_figure(off_joint, untiled, TILING, cell=8, cell_in=8).max_abs == 0.0
    assert seam_figure(off_joint[..., :32, :32], untiled[..., :32, :32], TILING, cell=8, cell_in=8).max_abs == 0.0
    hard = seam_figure(on_joint, untiled, Tiling(tile=16, overlap=0), cell=8, cell_in=8)
    assert hard.max_abs == 2.0


def test_bad_tilings_are_refused(tokenizer: CausalVideoTokenizer) -> None:
    for overlap in (-8, 32):
        with pytest.raises(UserError, match=f"overlap: got {overlap}, expected at least 0 and below tile 32"):
            Tiling(tile=32, overlap=overlap)
    for bad in (Tiling(tile=36, overlap=8), Tiling(tile=32, overlap=4)):
        with pytest.raises(UserError, match="a multiple of 8 pixels"):
            encode_video(tokenizer, noise(1, 3, 1, 48, 48), tiling=bad)
    with pytest.raises(UserError, match="tiling: got torch.int64"):
        code_tiles(torch.zeros(1, 6).long(), lambda tile, _: tile, TILING, cell=8, cell_in=1, cell_out=1)
    with pytest.raises(UserError, match="shape: got"):
        seam_figure(torch.zeros(8, 8), torch.zeros(8, 16), TILING, cell=8, cell_in=8)

"""Latent statistics: what is read and written; what normalises by them is tested with the latent cache."""

from pathlib import Path

import pytest
import torch

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError
from nemo_cosmos.tokenizer.statistics import (
    LatentStatistics,
    check_statistics,
    of_diffusers,
    read_published,
    write_published,
)

CHANNELS, FRAMES = 4, 3


def random_pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Published statistics; of videos in the flat form, of pictures with axes to broadcast."""
    torch.save(tuple(x.flatten() for x in random_pair(CHANNELS, FRAMES)), tmp_path / "mean_std.pt")
    torch.save([x.view(1, CHANNELS, 1, 1) for x in random_pair(CHANNELS)], tmp_path / "image_mean_std.pt")
    return tmp_path


def test_published_files_are_read_and_written_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    found = read_published(folder, CHANNELS)
    mean, std = random_pair(CHANNELS, FRAMES)
    assert torch.equal(torch.tensor(found.mean).view(CHANNELS, FRAMES), mean)
    assert torch.equal(torch.tensor(found.std).view(CHANNELS, FRAMES), std)
    assert (found.image_mean, found.image_std) == tuple(tuple(x.tolist()) for x in random_pair(CHANNELS))
    (tmp_path / "again").mkdir()
    write_published(tmp_path / "again", found, CHANNELS)
    assert read_published(tmp_path / "again", CHANNELS) == found
    written = torch.load(tmp_path / "again" / "mean_std.pt", weights_only=True)
    assert all(torch.equal(x, y) and x.dtype == torch.float32 for x, y in zip(written, (mean, std), strict=True))


def test_numbers_beyond_float32_are_written_exactly(tmp_path: Path) -> None:
    statistics = LatentStatistics(mean=(0.11362758,) * CHANNELS, std=(1.0,) * CHANNELS)
    write_published(tmp_path, statistics, CHANNELS)
    assert read_published(tmp_path, CHANNELS) == statistics
    assert not (tmp_path / "image_mean_std.pt").exists()


def test_nothing_there_is_nothing_known(tmp_path: Path) -> None:
    assert read_published(tmp_path, CHANNELS) == LatentStatistics()
    assert LatentStatistics().of(1) is None


def test_a_card_holds_them(folder: Path) -> None:
    found = read_published(folder, CHANNELS)
    card = CheckpointCard(model="t", config={}, step=0, data="", command="", **found.card_fields())
    assert LatentStatistics.of_card(CheckpointCard.from_dict(card.to_dict())) == found


def test_pictures_have_their_own_where_these_are_known(folder: Path) -> None:
    found = read_published(folder, CHANNELS)
    assert found.of(1) == (found.image_mean, found.image_std)
    assert found.of(2) == (found.mean, found.std)
    (folder / "image_mean_std.pt").unlink()
    assert read_published(folder, CHANNELS).of(1) == (found.mean, found.std)


def test_diffusers_numbers_are_read_as_they_stand() -> None:
    values = {"latents_mean": [0.5] * 8, "latents_std": [2.0] * 8}
    assert of_diffusers(values, CHANNELS) == LatentStatistics(mean=(0.5,) * 8, std=(2.0,) * 8)
    assert of_diffusers({"latents_mean": None}, CHANNELS) == LatentStatistics()
    with pytest.raises(UserError, match=r"latents_mean, latents_std: got .*\[8, 8\]', expected 3 numbers each"):
        of_diffusers(values, 3)


@pytest.mark.parametrize(
    "content",
    [
        (torch.zeros(5), torch.ones(5)),
        [torch.zeros(4)],
        {"mean": torch.zeros(4)},
        (torch.zeros(8), torch.ones(4)),
        (torch.zeros(4), torch.zeros(4)),
        (torch.zeros(0), torch.zeros(0)),
        (torch.full((4,), float("nan")), torch.ones(4)),
    ],
)
def test_broken_files_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "mean_std.pt")
    with pytest.raises(UserError, match="mean_std.pt: (got|expected a mean and a standard deviation)"):
        read_published(tmp_path, CHANNELS)


def test_statistics_of_too_few_frames_are_refused() -> None:
    for numbers, frames in ((3 * CHANNELS, 3), (3 * CHANNELS, 1), (CHANNELS, 9)):
        check_statistics("s", [0] * numbers, [1] * numbers, num_channels=CHANNELS, num_latent_frames=frames)
    with pytest.raises(UserError, match="s: got 'statistics of 3 latent frames', expected at least 4"):
        check_statistics("s", [0] * 12, [1] * 12, num_channels=CHANNELS, num_latent_frames=4)

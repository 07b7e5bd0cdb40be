"""Windows cut out of larger frames, and batches of pictures between batches of videos."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_cosmos.data.clips import ClipDataset
from nemo_cosmos.data.datamodule import VideoClipDataModule
from nemo_cosmos.data.shuffle import AlternatingBatches, PictureSamples, ShuffledEpochs
from nemo_cosmos.errors import UserError
from nemo_cosmos.video_io import read_video
from tests.unit.data.curated_folder import write_curated


class Numbers(torch.utils.data.Dataset):
    def __init__(self, kind: str, length: int = 100) -> None:
        self.kind, self.length = kind, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return {"kind": self.kind, "value": torch.tensor(index)}

    def drawn(self, index: int, generator: np.random.Generator) -> dict:
        return {"value": torch.tensor(index), "draw": torch.tensor(generator.integers(1 << 40))}


def kinds(*, start: int, stop: int, batch: int, first_item: int, first_step: int, every: int = 2) -> list[str]:
    data = AlternatingBatches(
        Numbers("video"),
        Numbers("picture"),
        every=every,
        global_batch_size=batch,
        first_item=first_item,
        first_step=first_step,
    )
    return [data[i]["kind"] for i in range(start, stop)]


def test_every_second_batch_is_of_pictures_and_a_resumed_run_alternates_on() -> None:
    whole = kinds(start=0, stop=16, batch=4, first_item=0, first_step=0)
    assert whole == (["video"] * 4 + ["picture"] * 4) * 2
    assert kinds(start=12, stop=16, batch=4, first_item=12, first_step=3) == whole[12:]
    # Three steps of 4 samples, then batches of 8: step 3 is of pictures, although it begins in the middle of an 8.
    assert kinds(start=12, stop=28, batch=8, first_item=12, first_step=3) == ["picture"] * 8 + ["video"] * 8
    assert kinds(start=0, stop=6, batch=2, first_item=0, first_step=0, every=3) == ["video"] * 4 + ["picture"] * 2


def test_a_sample_of_pictures_stacks_different_ones_and_every_one_is_in_a_sample() -> None:
    samples = PictureSamples(Numbers("picture", 12), num_pictures=3)
    items = [samples.drawn(i, np.random.default_rng(0))["value"].tolist() for i in range(len(samples))]
    assert sorted(sum(items, [])) == list(range(12))
    few = PictureSamples(Numbers("picture", 2), num_pictures=3)
    assert few.drawn(0, np.random.default_rng(0))["value"].tolist() == [0, 1, 0]


def test_draws_depend_on_the_item_and_the_seed_only() -> None:
    data = ShuffledEpochs(Numbers("x"), num_samples=300, seed=1)
    fresh = ShuffledEpochs(Numbers("x"), num_samples=999, seed=1)
    assert data[150]["draw"] == fresh[150]["draw"]
    assert len({int(data[i]["draw"]) for i in range(300)}) == 300
    assert ShuffledEpochs(Numbers("x"), num_samples=300, seed=2)[150]["draw"] != data[150]["draw"]


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return write_curated(tmp_path, size=(48, 80))


def test_a_window_is_cut_out_at_the_clips_aspect(wide: Path) -> None:
    data = ClipDataset(wide, split="train", num_frames=9, height=16, width=16, crop_from=48, stride=8)
    clip, start = data.windows[1]
    frames, _ = read_video(wide.parent / f"{(0, 1, 2, 4)[clip]}.mp4")
    expected = torch.from_numpy(frames[start : start + 9, 16:32, 32:48]).permute(3, 0, 1, 2) / 127.5 - 1
    # The rounding of to_model's float32 arithmetic.
    torch.testing.assert_close(data[1]["video"], expected, rtol=0, atol=1e-6)
    cuts = [data.drawn(1, np.random.default_rng(seed))["video"] for seed in (0, 0, 1)]
    assert torch.equal(cuts[0], cuts[1])
    assert not torch.equal(cuts[0], cuts[2])
    halved = ClipDataset(wide, split="train", num_frames=9, height=16, width=16, crop_from=24)
    assert halved[0]["video"].shape == (3, 9, 16, 16)


def test_a_crop_from_less_than_the_window_is_refused(wide: Path) -> None:
    with pytest.raises(UserError, match="crop_from: got 8"):
        ClipDataset(wide, split="train", num_frames=9, height=16, width=16, crop_from=8)


def training_batch(data: VideoClipDataModule, step: int) -> torch.Tensor:
    data.trainer = SimpleNamespace(global_step=0, max_steps=4)
    samples = data.training_samples(4 * data.global_batch_size)
    start = step * data.global_batch_size
    return torch.stack([samples[i]["video"] for i in range(start, start + data.global_batch_size)])


def test_pictures_come_from_clips_too_short_for_a_window_too(curated: Path) -> None:
    data = VideoClipDataModule(
        str(curated),
        num_frames=9,
        height=32,
        width=32,
        pictures_every=2,
        pictures_per_sample=2,
        micro_batch_size=2,
        global_batch_size=2,
    )
    assert training_batch(data, 0).shape == (2, 3, 9, 32, 32)
    assert training_batch(data, 1).shape == (2, 2, 3, 1, 32, 32)
    assert len(data._windows("train", 1)) == 3 * 4 + 1  # frames 0, 8, 16, 24 of clips of 25, and 0 of the one of 5
    assert data.card_fields()["data"].endswith("one batch in 2 of single frames, 2 a sample")


@pytest.mark.parametrize("setting", [{"pictures_every": 1}, {"pictures_per_sample": 0}])
def test_settings_out_of_range_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        VideoClipDataModule("anywhere", **setting)

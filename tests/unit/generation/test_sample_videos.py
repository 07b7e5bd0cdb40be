"""Pictures of generated held-out videos while a WFM trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.data.datamodule import LatentDataModule
from nemo_cosmos.data.latent_cache import LatentCacheConfig
from nemo_cosmos.diffusion.actions import actions_per_latent_frame
from nemo_cosmos.diffusion.conditioning import ConditioningConfig
from nemo_cosmos.diffusion.step import DiffusionModel
from nemo_cosmos.errors import UserError
from nemo_cosmos.generation import sample_videos
from nemo_cosmos.generation.sample_videos import SampleVideos, frame_sheet
from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.stored_weights import read_whole
from nemo_cosmos.tokenizer.statistics import LatentStatistics
from nemo_cosmos.training.api import pretrain
from nemo_cosmos.training.defaults import default_log, default_optim, default_trainer
from nemo_cosmos.video_io import read_image
from tests.unit.data.curated_folder import write_curated
from tests.unit.data.test_latent_cache import _write
from tests.unit.diffusion.tiny_run import Latents, tiny_dit
from tests.unit.training.tiny_run import Losses


@pytest.fixture(autouse=True)
def _closed_groups() -> Iterator[None]:
    yield
    startup.shutdown()


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the embedded tokenizer: 17 frames of 32x32."""
    folder = tmp_path_factory.mktemp("latents")
    config = LatentCacheConfig(num_frames=17, height=32, width=32, window_stride=8)
    tokenizer = load_tokenizer("tokenizer_tiny").model
    _write(write_curated(folder), folder / "latents", tokenizer=tokenizer, config=config)
    return folder / "latents"


def train(
    folder: Path, latents: Path, callbacks: list, *, tensorboard: bool = False, **trainer_arguments: Any
) -> dict[int, float]:
    losses = Losses()
    pretrain(
        DiffusionModel(
            tiny_dit(crossattn_emb_channels=4, num_layers=1), conditioning=ConditioningConfig(max_condition_frames=1)
        ),
        LatentDataModule(str(latents), micro_batch_size=2, global_batch_size=2),
        default_trainer(max_steps=3, callbacks=[losses, *callbacks], **trainer_arguments),
        log=default_log(folder, save_every=2, tensorboard=tensorboard),
        optim=default_optim(lr=1e-3, max_steps=3),
    )
    startup.shutdown()
    return losses.by_step


def test_held_out_videos_are_shown_beside_what_the_model_makes_of_them(latents: Path, tmp_path: Path) -> None:
    sampling = Weights(every=2, tokenizer="tokenizer_tiny", num_samples=2, num_columns=5, num_steps=2)
    with_samples = train(tmp_path / "shown", latents, [sampling], tensorboard=True, ema_decay=0.5)
    [picture] = (tmp_path / "shown" / "samples").iterdir()
    assert picture.name == "step=0000002.png"
    sheet = read_image(picture).reshape(4, 32, 5, 32, 3)
    real, generated = sheet[0].astype(int), sheet[1].astype(int)
    # The first frame is given, up to rounding; the rest of what two steps of training make of noise is something else.
    assert np.abs(real[:, 0] - generated[:, 0]).max() <= 1
    assert np.abs(real[:, 4] - generated[:, 4]).mean() > 5
    events = EventAccumulator(str(tmp_path / "shown" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [2]
    assert {"reduced_train_loss", "grad_norm", "lr", "tokens_per_s", "mfu"} <= set(events.Tags()["scalars"])
    # Training does not notice, though what is shown are the averages.
    assert train(tmp_path / "plain", latents, []) == with_samples
    averaged = read_whole(tmp_path / "shown" / "checkpoints" / "step=0000002")
    assert all(torch.equal(averaged[name], weight) for name, weight in sampling.seen.items())


class Weights(SampleVideos):
    """Keeps what it samples by."""

    def _rows(self, statistics: LatentStatistics, model: DiffusionModel, network: torch.nn.Module) -> list[np.ndarray]:
        self.seen = {name: weight.clone() for name, weight in network.named_parameters()}
        return super()._rows(statistics, model, network)


def test_a_sample_has_all_that_training_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setattr(sample_videos, "VideoDenoiser", lambda **named: given.update(named))
    monkeypatch.setitem(sample_videos.SAMPLERS, "euler", lambda denoiser, noise, sigmas: noise)
    law = ConditioningConfig(max_condition_frames=1)
    model = DiffusionModel(tiny_dit(action_dim=7), conditioning=law)
    item = {**Latents()[0], "actions": torch.randn(8, 7)}
    real = item["latent"][None]
    sampled = [
        SampleVideos(every=1, tokenizer="any", guidance=3.0)._generate(
            item, real, model, torch.nn.Identity(), seed=seed
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    assert (given["guidance"], given["fps"].tolist(), given["video2world"]) == (3.0, [24.0], True)
    assert torch.equal(given["text_emb"][0], item["text_emb"]) and not given["negative_text_emb"].any()
    assert torch.equal(given["given"], real * 0.5)
    assert given["mask"][0, 0, :, 0, 0].tolist() == [1, 0]
    assert torch.equal(given["actions"], actions_per_latent_frame(item["actions"][None], 8))


def test_another_tokenizer_than_the_latents_is_refused(latents: Path, tmp_path: Path) -> None:
    other = tmp_path / "latents"
    other.mkdir()
    card = (latents / "cache.json").read_text()
    for place in ("train", "heldout"):
        (other / place).symlink_to(latents / place)
    fingerprint = load_tokenizer("tokenizer_tiny").model.fingerprint()
    (other / "cache.json").write_text(card.replace(fingerprint, "another"))
    with pytest.raises(
        UserError, match=r"tokenizer of SampleVideos: got 'tokenizer_tiny .*expected the latents' \(anot"
    ):
        train(tmp_path / "run", other, [SampleVideos(every=2, tokenizer="tokenizer_tiny")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"every": 0}, "every, num_samples, num_columns"), ({"every": 1, "sampler": "dance"}, "sampler: got 'dance'")],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SampleVideos(tokenizer="tokenizer_tiny", **settings)


def test_videos_of_other_sizes_are_brought_to_the_firsts() -> None:
    small, large = np.full((2, 4, 6, 3), 10, np.uint8), np.full((3, 8, 12, 3), 200, np.uint8)
    sheet = frame_sheet([small, large])
    assert sheet.shape == (8, 18, 3)
    assert (sheet[:4, :12] == 10).all() and (sheet[:4, 12:] == 0).all() and (sheet[4:] == 200).all()

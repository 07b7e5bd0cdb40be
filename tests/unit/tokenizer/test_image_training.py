"""Tokenizers of images train through NeMo's trainer, and a resumed run goes on exactly where it was cut off."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.data.datamodule import VideoClipDataModule
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.stored_weights import read_whole
from nemo_cosmos.tokenizer.adversary import STATE_FILE
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.load import load
from nemo_cosmos.tokenizer.losses import LossConfig, WeightSchedule
from nemo_cosmos.tokenizer.megatron_model import MegatronImageTokenizer
from nemo_cosmos.tokenizer.model_config import TokenizerModelConfig
from nemo_cosmos.tokenizer.perceptual import VggPerceptual
from nemo_cosmos.tokenizer.step import TokenizerModel
from nemo_cosmos.tokenizer.weights import read_tensors
from nemo_cosmos.training.api import pretrain
from nemo_cosmos.training.defaults import default_log, default_optim, default_resume, default_trainer
from tests.unit.data.curated_folder import write_curated
from tests.unit.tokenizer.conftest import CODE, random_tokenizer
from tests.unit.tokenizer.tiny_stages import Metrics, PooledPixels, adversary

SHAPE = {"modality": "image", "channels": 32, "channels_mult": (1, 1), "num_res_blocks": 1, "temporal_compression": 1}
CONTINUOUS = TokenizerConfig(**SHAPE, patch_size=4, latent_channels=4)
DISCRETE = TokenizerConfig(**SHAPE, patch_size=4, **CODE)
STEPS = 4


@pytest.fixture(autouse=True)
def _closed_groups():
    yield
    startup.shutdown()


@pytest.fixture(scope="module")
def curated(tmp_path_factory) -> Path:
    """Thirteen pictures for training: an epoch ends within step 4."""
    return write_curated(tmp_path_factory.mktemp("clips"))


def run(folder: Path, curated: Path, architecture: TokenizerConfig, *, steps: int = STEPS) -> dict[int, dict]:
    """Trains (or goes on) with all terms that pictures have, saving every second step."""
    later = WeightSchedule(values=(0.0, 0.1), boundaries=(1,))
    model = TokenizerModel(
        TokenizerModelConfig(architecture=architecture, loss=LossConfig(perceptual_weight=0.1, gram_weight=later)),
        perceptual=VggPerceptual(PooledPixels(), layer_weights=(1.0, 0.5)),
        adversary=adversary(),
    )
    data = VideoClipDataModule(str(curated), num_frames=1, height=32, width=32, micro_batch_size=2, global_batch_size=4)
    metrics = Metrics()
    pretrain(
        model,
        data,
        default_trainer(max_steps=steps, callbacks=[metrics], val_every=2, val_batches=1),
        log=default_log(folder, save_every=2, keep=-1),
        optim=default_optim(lr=1e-3, max_steps=20, warmup=2, eps=1e-5),
        resume=default_resume(),
    )
    return metrics.by_step


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step={step:07d}"


@pytest.mark.parametrize("architecture", [CONTINUOUS, DISCRETE], ids=["CI", "DI"])
def test_it_learns_and_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(architecture, curated, tmp_path):
    logged = run(tmp_path / "whole", curated, architecture)
    startup.shutdown()
    assert logged[STEPS]["l1"] < logged[1]["l1"]
    assert logged[1]["reduced_train_loss"] == pytest.approx(logged[1]["l1"] + 0.1 * logged[1]["perceptual"], rel=1e-6)
    assert logged[2]["adversarial"] != 0
    shutil.copytree(checkpoint(tmp_path / "whole", 2), checkpoint(tmp_path / "again", 2))
    again = run(tmp_path / "again", curated, architecture)
    assert again == {step: logged[step] for step in (3, 4)}
    first, second = (read_whole(checkpoint(tmp_path / f, STEPS)) for f in ("whole", "again"))
    assert first.keys() == random_tokenizer(architecture).state_dict().keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (read_tensors(checkpoint(tmp_path / f, STEPS) / STATE_FILE) for f in ("whole", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    card = CheckpointCard.from_dict(read_json(checkpoint(tmp_path / "whole", STEPS) / "card.json"))
    assert card.model == f"{architecture.compression_name}_32"
    assert load(checkpoint(tmp_path / "whole", STEPS)).model.tokenizer_config == architecture


@pytest.mark.parametrize("architecture", [CONTINUOUS, DISCRETE], ids=["CI", "DI"])
def test_pictures_are_videos_of_one_frame(architecture: TokenizerConfig) -> None:
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = random_tokenizer(architecture)
    trained = TokenizerModelConfig(architecture=architecture).configure_model()
    assert isinstance(trained, MegatronImageTokenizer)
    trained.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(trained(images.unsqueeze(2)), plain(images).unsqueeze(2))
        assert torch.equal(trained.encode(images), plain.encode(images))
    for shape in ((2, 3, 16, 24), (2, 3, 9, 16, 24)):
        with pytest.raises(UserError, match=r"shape of pictures: got .*expected \[B, 3, 1, H, W\]"):
            trained(torch.zeros(shape))


def test_blocks_are_run_again_in_the_backward_pass() -> None:
    settings = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    images = torch.rand(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    gradients = []
    for kind in ({}, settings):
        model = TokenizerModelConfig(architecture=CONTINUOUS, **kind).configure_model()
        model.load_state_dict(random_tokenizer(CONTINUOUS).state_dict())
        assert ("forward" in vars(model.encoder.mid.block_1)) == bool(kind)
        model(images).square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    # The same operations in the same order: no rounding differs.
    assert all(map(torch.equal, *gradients))

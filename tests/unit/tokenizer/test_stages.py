"""A run with all losses, the discriminator and batches of pictures: it goes on exactly where it was cut off."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.stored_weights import read_whole
from nemo_cosmos.tokenizer.adversary import STATE_FILE, Adversary
from nemo_cosmos.tokenizer.discriminator import DiscriminatorConfig
from nemo_cosmos.tokenizer.weights import read_tensors
from tests.unit.data.curated_folder import write_curated
from tests.unit.tokenizer.tiny_stages import adversary, run

EMA_DECAY = 0.9


@pytest.fixture(autouse=True)
def _closed_groups():
    yield
    startup.shutdown()


@pytest.fixture(scope="module")
def curated(tmp_path_factory) -> Path:
    """Four clips for training, one of them too short for a window: an epoch of 9 windows ends within step 3."""
    return write_curated(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, curated) -> tuple[Path, dict[int, dict[str, float]]]:
    """Five steps without interruption, with checkpoints after 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("whole")
    logged = run(folder, curated, steps=5, judge=adversary(), ema_decay=EMA_DECAY)
    startup.shutdown()
    return folder, logged


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step={step:07d}"


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(whole, curated, tmp_path):
    folder, logged = whole
    shutil.copytree(checkpoint(folder, 2), checkpoint(tmp_path, 2))
    again = run(tmp_path, curated, steps=5, judge=adversary(), ema_decay=EMA_DECAY)
    assert sorted(again) == [3, 4, 5]
    assert again == {step: logged[step] for step in again}
    for use_ema in (True, False):
        first, second = (read_whole(checkpoint(f, 5), use_ema=use_ema) for f in (folder, tmp_path))
        assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (read_tensors(checkpoint(f, 5) / STATE_FILE) for f in (folder, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_each_term_comes_in_by_its_schedule(whole):
    _, logged = whole
    assert logged[1]["adversarial"] == 0
    assert logged[1]["reduced_train_loss"] == pytest.approx(logged[1]["l1"] + 0.1 * logged[1]["perceptual"], rel=1e-6)
    assert all(logged[step]["adversarial"] != 0 for step in (2, 3, 4, 5))
    assert logged[3]["reduced_train_loss"] > logged[3]["l1"] + 0.1 * logged[3]["perceptual"] + logged[3]["adversarial"]


def test_the_discriminator_learns_on_its_own_optimizer(whole):
    folder, logged = whole
    state = {step: read_tensors(checkpoint(folder, step) / STATE_FILE) for step in (2, 5)}
    assert all(float(of_step["step.head.weight"]) == step for step, of_step in state.items())
    start = adversary().discriminator.head.weight
    moved = [(s["discriminator.head.weight"] - start).abs().max() for s in state.values()]
    # Adam's first steps are about the learning rate: half of it in the warm-up's first step, then all.
    assert 0.5e-3 < moved[0] < 2e-3 < moved[1] < 6e-3
    assert logged[5]["discriminator"] < logged[1]["discriminator"]


def test_the_card_tells_what_measured_the_losses(whole):
    card = CheckpointCard.from_dict(read_json(checkpoint(whole[0], 5) / "card.json"))
    assert card.measured_by == {
        "perceptual": "pooled pixels",
        "flow": "Lucas-Kanade flow",
        "adversarial": f"PatchDiscriminator3d of {sum(p.numel() for p in adversary().discriminator.parameters()):,} "
        "parameters",
    }


@pytest.mark.parametrize(
    ("judge", "features", "message"),
    [
        (lambda: None, "pooled pixels", "loss terms: got .* as in the resumed run"),
        (lambda: adversary(), "other weights", "loss terms: got .*other weights"),
        (lambda: adversary(start=3), "pooled pixels", None),
    ],
)
def test_going_on_with_another_loss_is_refused(whole, curated, tmp_path, judge, features, message):
    shutil.copytree(checkpoint(whole[0], 2), checkpoint(tmp_path, 2))
    if message is None:  # a weight may change
        assert run(tmp_path, curated, steps=3, judge=judge(), features=features)[3]["adversarial"] == 0
        return
    with pytest.raises(UserError, match=message):
        run(tmp_path, curated, steps=3, judge=judge(), features=features)


def test_another_discriminator_is_refused(whole, tmp_path):
    judge = adversary()
    judge.load(checkpoint(whole[0], 2) / STATE_FILE)
    wider = Adversary(DiscriminatorConfig(channels=8, num_levels=2), weight=0.1)
    with pytest.raises(UserError, match="discriminator: got"):
        wider.load(checkpoint(whole[0], 2) / STATE_FILE)
    with pytest.raises(UserError, match="has no discriminator"):
        judge.load(tmp_path / STATE_FILE)


def test_bf16_trains_like_float32(whole, curated, tmp_path):
    logged = run(tmp_path, curated, steps=2, judge=adversary(), precision="bf16-mixed")
    # bf16 keeps 8 bits, hence 0.4% per operation; float32 masters keep the steps.
    for name in ("reduced_train_loss", "l1", "discriminator"):
        assert logged[2][name] == pytest.approx(whole[1][2][name], rel=0.03)
    state = read_tensors(checkpoint(tmp_path, 2) / STATE_FILE)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())

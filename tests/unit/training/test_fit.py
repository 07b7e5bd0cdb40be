import csv
import gc
import json
import os
import shutil

import pytest
import torch

from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel import startup
from nemo_cosmos.parallel.stored_weights import read_whole
from nemo_cosmos.training.api import finetune, validate
from nemo_cosmos.training.callbacks import COLUMNS
from nemo_cosmos.training.checkpoint import finished_checkpoints
from nemo_cosmos.training.defaults import default_log, default_optim, default_trainer
from nemo_cosmos.training.load import load_weights
from tests.unit.training.tiny_run import TinyData, TinyModel, run, tiny_config, tiny_gpt

EMA_DECAY = 0.5


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 6 steps, saved at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    losses = run(folder, steps=6, ema_decay=EMA_DECAY)
    startup.shutdown()
    return folder, losses


def test_the_loss_falls(uninterrupted):
    _, losses = uninterrupted
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1] - 0.3


def test_a_process_keeps_nothing_open_of_former_runs(uninterrupted, tmp_path):
    opened = []
    for name in ("first", "second"):
        run(tmp_path / name, steps=1)
        startup.shutdown()
        gc.collect()
        opened.append(len(os.listdir("/proc/self/fd")))
    assert opened[1] <= opened[0]  # NeMo itself keeps the newest run until the next one


def test_the_newest_checkpoints_are_kept(uninterrupted):
    folder, _ = uninterrupted
    names = [path.name for path in finished_checkpoints(folder / "checkpoints")]
    assert names == ["step=0000004", "step=0000006"]


def test_validations_save_nothing(tmp_path):
    run(tmp_path, steps=3, val_every=1, val_batches=1)
    folders = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink()]
    assert sorted(folders) == ["step=0000002", "step=0000003"]


def test_a_run_that_lost_its_last_steps_makes_them_again_exactly(uninterrupted, tmp_path):
    folder, losses = uninterrupted
    resumed = tmp_path / "resumed"
    shutil.copytree(folder, resumed, symlinks=True)
    shutil.rmtree(resumed / "checkpoints" / "step=0000006")
    (resumed / "checkpoints" / "step=0000006-last").unlink()
    again = run(resumed, steps=6, ema_decay=EMA_DECAY)
    assert again == {5: losses[5], 6: losses[6]}
    startup.shutdown()
    with startup.initialize():
        first, second = tiny_gpt(tiny_config()), tiny_gpt(tiny_config())
        for use_ema in (True, False):
            load_weights(first, folder / "checkpoints" / "step=0000006", use_ema=use_ema)
            load_weights(second, resumed / "checkpoints" / "step=0000006", use_ema=use_ema)
            assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    rows = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == list(losses.values())


def test_a_half_written_checkpoint_is_passed_over(uninterrupted, tmp_path):
    folder, losses = uninterrupted
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    (tmp_path / "checkpoints" / "step=0000006-unfinished").touch()
    again = run(tmp_path, steps=6, ema_decay=EMA_DECAY)
    assert again == {5: losses[5], 6: losses[6]}


def test_a_checkpoint_without_its_index_is_passed_over(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    (tmp_path / "checkpoints" / "step=0000006" / "weights" / ".metadata").unlink()
    assert [path.name for path in finished_checkpoints(tmp_path / "checkpoints")] == ["step=0000004"]


def test_metrics_have_all_columns(uninterrupted):
    folder, losses = uninterrupted
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [float(row["loss"]) for row in rows] == list(losses.values())
    assert [float(row["lr"]) for row in rows[:3]] == pytest.approx([1e-3, 2e-3, 3e-3])  # warm-up of 2 steps to 3e-3
    assert all(float(row[name]) > 0 for row in rows for name in ("grad_norm", "seconds", "peak_memory_mb"))


def test_card_tells_step_and_figures(uninterrupted):
    folder, losses = uninterrupted
    card = CheckpointCard.from_dict(read_json(folder / "checkpoints" / "step=0000006" / "card.json"))
    assert (card.model, card.step, card.data) == ("TinyModel", 6, "TinyData")
    assert card.figures["reduced_train_loss"] == losses[6]
    assert card.config["hidden_size"] == 64


def test_the_checkpoint_holds_averages_beside_weights(uninterrupted):
    folder, _ = uninterrupted
    with startup.initialize():
        plain, averaged = tiny_gpt(tiny_config()), tiny_gpt(tiny_config())
        load_weights(plain, folder / "checkpoints" / "step=0000006", use_ema=False)
        load_weights(averaged, folder / "checkpoints" / "step=0000006", use_ema=True)
        distance = max((a - b).abs().max() for a, b in zip(plain.parameters(), averaged.parameters(), strict=True))
    assert 1e-5 < distance < 2e-2  # steps of Adam are at most 3e-3 each, and a decay of 0.5 forgets in a few


def test_saves_in_the_background_hold_the_same(uninterrupted, tmp_path):
    folder, losses = uninterrupted
    assert run(tmp_path, steps=6, ema_decay=EMA_DECAY, async_save=True) == losses
    for use_ema in (True, False):
        expected, got = (
            read_whole(run / "checkpoints" / "step=0000006", use_ema=use_ema) for run in (folder, tmp_path)
        )
        assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    assert not list((tmp_path / "checkpoints").glob("*-unfinished"))


def test_finetune_starts_from_the_base(uninterrupted, tmp_path):
    folder, losses = uninterrupted
    base = folder / "checkpoints" / "step=0000006"
    finetune(
        TinyModel(),
        TinyData(),
        default_trainer(max_steps=1),
        log=default_log(tmp_path),
        optim=default_optim(lr=1e-4, max_steps=10),
        base=base,
    )
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["loss"] < losses[1] - 0.3
    card = CheckpointCard.from_dict(read_json(tmp_path / "checkpoints" / "step=0000001" / "card.json"))
    assert card.parent == str(base)


def test_validate_measures_a_checkpoint(uninterrupted, tmp_path):
    folder, losses = uninterrupted
    checkpoint = folder / "checkpoints" / "step=0000006"
    validate(
        TinyModel(),
        TinyData(),
        default_trainer(max_steps=1, val_every=1, val_batches=2),
        log=default_log(tmp_path),
        checkpoint=checkpoint,
    )
    assert losses[6] - 0.5 < read_json(tmp_path / "validation.json")["val_loss"] < losses[1] - 0.1


def test_a_plain_module_is_loaded_without_process_groups(uninterrupted):
    folder, _ = uninterrupted
    checkpoint = folder / "checkpoints" / "step=0000006"
    plain = torch.nn.ModuleDict({"output_layer": torch.nn.Linear(64, 96, bias=False)})
    load_weights(plain, checkpoint, use_ema=False)
    with startup.initialize():
        whole = tiny_gpt(tiny_config())
        load_weights(whole, checkpoint, use_ema=False)
    assert torch.equal(plain["output_layer"].weight, whole.output_layer.weight)


def test_a_missing_weight_is_named(uninterrupted):
    folder, _ = uninterrupted
    added = torch.nn.ModuleDict({"actions": torch.nn.Linear(7, 64, bias=False)})
    first = added["actions"].weight.clone()
    with pytest.raises(UserError, match=r"weight module\.actions\.weight is missing"):
        load_weights(added, folder / "checkpoints" / "step=0000006")
    load_weights(added, folder / "checkpoints" / "step=0000006", may_lack=("actions",))
    assert torch.equal(added["actions"].weight, first)


def test_a_weight_of_another_shape_is_named(uninterrupted):
    folder, _ = uninterrupted
    with startup.initialize():
        wider = tiny_gpt(tiny_config(ffn_hidden_size=256))
        with pytest.raises(UserError, match=r"linear_fc1\.weight has shape \[2, 128, 64\], expected \[2, 256, 64\]"):
            load_weights(wider, folder / "checkpoints" / "step=0000006")


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        load_weights(torch.nn.Linear(1, 1), tmp_path)


def test_a_layout_that_does_not_fit_is_refused_before_the_model_is_built(tmp_path):
    model = TinyModel()
    with pytest.raises(UserError, match="number of processes: got 1, expected a multiple of .* 2 x 1 x 1 = 2"):
        finetune(
            model,
            TinyData(),
            default_trainer(max_steps=1, tp=2),
            log=default_log(tmp_path),
            optim=default_optim(lr=1, max_steps=1),
        )
    assert not hasattr(model, "module")


def test_a_global_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match="global_batch_size: got 4, expected a multiple of"):
        finetune(
            TinyModel(),
            TinyData(micro_batch_size=3),
            default_trainer(max_steps=1),
            log=default_log(tmp_path),
            optim=default_optim(lr=1, max_steps=1),
        )

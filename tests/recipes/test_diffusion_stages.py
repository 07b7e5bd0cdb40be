"""The four stages of a WFM's pretraining, in a row."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import fiddle
import pytest
from typer.testing import CliRunner

from nemo_cosmos.cli.main import app
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.data.latent_cache import LatentCacheConfig
from nemo_cosmos.errors import UserError
from nemo_cosmos.files import read_json
from nemo_cosmos.parallel import startup
from recipes.stages import stages_of, submit_stages
from tests.recipes.test_slurm_road import STAND_IN
from tests.unit.data.curated_folder import write_curated
from tests.unit.data.test_latent_cache import _write

CACHES = {"latents": "runs/low", "latents_highres": "runs/high", "latents_quality": "runs/best"}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of 9 frames of 32x32, of 25 of 48x48, and pictures of both sizes."""
    folder = tmp_path_factory.mktemp("caches")
    curated = write_curated(folder, size=(48, 48))
    for name, frames, side in (("low", 9, 32), ("high", 25, 48), ("pictures", 1, 32), ("large_pictures", 1, 48)):
        _write(curated, folder / name, config=LatentCacheConfig(num_frames=frames, height=side, width=side))
    return folder


def test_every_stage_goes_on_from_the_weights_and_statistics_of_the_one_before(caches: Path, tmp_path: Path) -> None:
    stages = stages_of(
        "tiny",
        latents=str(caches / "low"),
        latents_highres=str(caches / "high"),
        latents_quality=str(caches / "high"),
        pictures=str(caches / "pictures"),
        pictures_highres=str(caches / "large_pictures"),
        directory=str(tmp_path),
        max_steps=(3, 2, 2, 2),
    )
    cards = []
    for stage in stages:
        config = stage.recipe.model.config
        config.num_layers, config.hidden_size, config.in_channels, config.out_channels = 1, 72, 3, 3
        config.crossattn_emb_channels = 4
        stage.recipe.data.micro_batch_size = stage.recipe.data.global_batch_size = 2
        folder = fiddle.build(stage.recipe)()
        startup.shutdown()
        assert folder == tmp_path / stage.name
        [checkpoint] = sorted(path for path in (folder / "checkpoints").iterdir() if not path.name.endswith("-last"))
        cards.append(CheckpointCard.from_dict(read_json(checkpoint / "card.json")))
    first = cards[0]
    assert [Path(card.parent).parent.parent.name for card in cards[1:]] == ["pretrain", "highres", "cooldown"]
    # Latents mean the same to the end, whatever the caches of later stages are like.
    assert {card.latent_mean for card in cards} == {first.latent_mean}
    assert {card.image_latent_mean for card in cards[:3]} == {first.image_latent_mean} != {None}
    rates = {stage.name: [row["lr"] for row in _rows(tmp_path / stage.name)] for stage in stages}
    assert rates["highres"] == [5e-4] * 2
    assert rates["cooldown"] == pytest.approx([5e-4, 2.5e-4])


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_jobs_of_a_cluster_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "executors.yaml"
    settings.write_text("slurm:\n  account: physics\n  partition: h100\n  container_image: nemo-cosmos:1\n")
    monkeypatch.setenv("NEMO_COSMOS_EXECUTORS", str(settings))
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "nemo_run"))
    scripts, programs = tmp_path / "scripts", tmp_path / "programs"
    scripts.mkdir()
    programs.mkdir()
    program = programs / "sbatch"
    program.write_text(STAND_IN.format(count=tmp_path / "count", log=tmp_path / "log.txt", scripts=scripts))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115 - as long as the test
    submit_stages(stages_of("14b", **CACHES, directory="/runs/14b", num_nodes=32))
    calls = [line.split(" ", 1) for line in (tmp_path / "log.txt").read_text().splitlines()]
    numbers = [number for number, _ in calls]
    names = [re.search(r"--job-name=\S*\.(\w+)", (scripts / f"{number}.sh").read_text()).group(1) for number in numbers]
    assert names == ["pretrain", "highres", "cooldown", "video2world"]
    assert "--dependency" not in calls[0][1]
    for before, (_, call) in zip(numbers, calls[1:], strict=False):
        assert re.search(rf"--dependency=afterok:{before}\b", call), call
    assert all("#SBATCH --nodes=32" in (scripts / f"{number}.sh").read_text() for number in numbers)


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        ("70b", {}, "size: got '70b'"),
        ("tiny", {"num_nodes": 2}, r"settings of tiny: got \['num_nodes'\]"),
        ("tiny", {"max_steps": (1, 2)}, r"max_steps: got \(1, 2\), expected 4 numbers"),
    ],
)
def test_stages_that_cannot_be_are_refused(size: str, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stages_of(size, **CACHES, directory="runs/stages", **settings)


def test_the_command_runs_the_stages_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr("nemo_cosmos.quickstart.process.run_recipe", ran.append)
    arguments = ["train-stages", "7b", "--directory", "runs/x", "--num-nodes", "16", "--max-steps", "9", "8", "7", "6"]
    pictures = ["--pictures", "runs/small", "--pictures-highres", "runs/large"]
    unclear = CliRunner().invoke(app, [*arguments, "--dryrun"])
    assert isinstance(unclear.exception, UserError) and "--dryrun" in str(unclear.exception) and not ran
    done = CliRunner().invoke(app, [*arguments, *pictures])
    assert done.exit_code == 0, done.output
    assert [recipe.data.pictures for recipe in ran] == ["runs/small", "runs/large", "runs/large", None]
    assert [(recipe.log.directory, recipe.trainer.max_steps, recipe.trainer.num_nodes) for recipe in ran] == [
        ("runs/x/pretrain", 9, 16),
        ("runs/x/highres", 8, 16),
        ("runs/x/cooldown", 7, 16),
        ("runs/x/video2world", 6, 16),
    ]

"""The Slurm example, with a stand-in for `sbatch` that notes what it is given."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nemo_cosmos.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "examples" / "slurm" / "road.sbatch"

STAND_IN = """#!/bin/bash
n=$(cat {count} 2>/dev/null || echo 100)
echo $((n + 1)) > {count}
echo "$((n + 1)) $*" >> {log}
for argument; do [ -f "$argument" ] && cp "$argument" {scripts}/$((n + 1)).sh; done
echo $((n + 1))
"""


@pytest.fixture(scope="module")
def road() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slurm_road", ROOT / "examples" / "slurm" / "road.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site with a stand-in sbatch; returns the folder of its log and scripts."""
    settings = tmp_path / "executors.yaml"
    settings.write_text(
        "slurm:\n  account: physics\n  partition: h100\n  cpu_partition: cpu\n  container_image: nemo-cosmos:1\n"
    )
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
    return tmp_path


def test_jobs_wait_for_each_other(road: ModuleType, submitted: Path) -> None:
    road.main(["--size", "tiny", "--parts", "4", "--runs", "/runs"])
    calls = (submitted / "log.txt").read_text().splitlines()
    scripts = {
        re.search(r"--job-name=\S*\.(\w+)", path.read_text()).group(1): (int(path.stem), path.read_text())
        for path in (submitted / "scripts").iterdir()
    }
    number = {name: first for name, (first, _) in scripts.items()}
    assert list(sorted(number, key=number.get)) == [
        "collect",
        "curate_parts",
        "curate",
        "tokenize",
        "pretrain",
        "finetune",
        "evaluate",
    ]
    order = sorted(number.values())
    for before, call in zip(order, calls[1:], strict=False):
        assert re.search(rf"--dependency=afterok:{before}\b", call), call
    assert "--dependency" not in calls[0]
    assert "#SBATCH --array=0-3" in scripts["curate_parts"][1]
    assert "#SBATCH --array=0-3" in scripts["tokenize"][1]
    assert "#SBATCH --array" not in scripts["curate"][1]


def test_7b_trains_on_many_nodes_from_what_was_pretrained(road: ModuleType, submitted: Path) -> None:
    jobs = {
        job.name: job
        for job in road.road(
            road.SIZES["7b"], tokenizer="/cv8", videos="/videos", runs=Path("/runs"), parts=64, nodes=8
        )
    }
    assert "collect" not in jobs
    assert jobs["curate_parts"].after == ()
    assert jobs["curate_parts"].recipe.input_dir == "/videos"
    for name in ("pretrain", "finetune"):
        executor, trainer = jobs[name].executor, jobs[name].recipe.trainer
        assert (executor.nodes, executor.ntasks_per_node, executor.gpus_per_node) == (8, 8, 8)
        assert (trainer.num_nodes, trainer.devices) == (8, 8)
    assert jobs["finetune"].recipe.base == "/runs/pretrain/checkpoints/step=0100000"
    assert jobs["evaluate"].recipe.checkpoint == "/runs/finetune/checkpoints/step=0010000"
    pretrained, tuned = (jobs[name].recipe.model.config for name in ("pretrain", "finetune"))
    assert pretrained.concat_condition_mask is tuned.concat_condition_mask is True

    assert jobs["tokenize"].recipe.tokenizer == jobs["evaluate"].recipe.tokenizer == "/cv8"


def test_seven_billion_need_a_tokenizer(road: ModuleType, submitted: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        road.main(["--size", "7b"])
    assert "--size 7b needs --tokenizer" in capsys.readouterr().err


@pytest.fixture
def published(submitted: Path) -> str:
    """A published folder below a mounted one; returns its path in the containers."""
    with (submitted / "executors.yaml").open("a") as settings:
        settings.write(f"  container_mounts: [{submitted}/data:/data]\n")
    folder = submitted / "data" / "Cosmos-Tokenize1-CV8x8x8-720p"
    folder.mkdir(parents=True)
    (folder / "model.pt").touch()
    return f"/data/{folder.name}"


def test_tokenizer_that_must_be_converted_is_not_submitted(
    road: ModuleType, submitted: Path, published: str, capsys: pytest.CaptureFixture
) -> None:
    renamed = submitted / "data" / "my_tokenizer"
    renamed.mkdir()
    (renamed / "model.pt").touch()
    for tokenizer in ("/data/my_tokenizer", f"{published}/model.pt"):
        with pytest.raises(SystemExit):
            road.main(["--size", "7b", "--runs", "/runs", "--tokenizer", tokenizer])
        assert "Convert it: `nemo-cosmos convert MODEL_PT FOLDER --to nemo" in capsys.readouterr().err
    assert not (submitted / "log.txt").exists()


def test_tokenizer_that_can_be_loaded_passes(road: ModuleType, submitted: Path, published: str) -> None:
    converted = submitted / "data" / "converted"
    (converted / "weights").mkdir(parents=True)
    (converted / "weights" / "metadata.json").touch()
    road.check_tokenizer("/data/converted")
    road.check_tokenizer(published)
    road.check_tokenizer("tokenizer_tiny")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("checkpoints/cv8", "expected an absolute path"),
        ("/nowhere/cv8", "seen here as /nowhere/cv8.*container_mounts"),
        ("tokenizer_huge", "neither a folder nor embedded weights"),
    ],
)
def test_tokenizer_that_is_not_there_is_refused(
    road: ModuleType, submitted: Path, tokenizer: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        road.check_tokenizer(tokenizer)


def test_tiny_on_many_nodes_is_refused(road: ModuleType, submitted: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        road.main(["--size", "tiny", "--nodes", "4"])
    assert "--nodes: got 4, expected 1" in capsys.readouterr().err


def test_sbatch_file_is_clean() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, SBATCH, ROOT / ".ci" / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

"""The `nemo` command finds our plugin; this needs real processes, since `nemo` reads installed entry points."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
FRAMEWORKS = {"megatron", "nemo", "lightning", "diffusers", "nemo_curator", "mujoco", "transformers"}


def test_dry_run_with_factory_overrides_and_executor(tmp_path: Path) -> None:
    command = [
        BIN / "nemo",
        "cosmos",
        "pretrain",
        "--factory",
        "diffusion_tiny_pretrain(max_steps=500)",
        "trainer.tp=2",
        "model.config.num_layers=3",
        "run.executor=slurm",
        "run.executor.nodes=2",
        "--dryrun",
        "-y",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "Dry run for task nemo_cosmos.training.api:pretrain",
        "default_trainer(max_steps=500, tp=2",
        "diffusion_tiny(num_layers=3)",
        "SlurmExecutor",
        "nodes=2",
        "Dry run for pretrain",
    ):
        assert text in done.stdout, done.stdout


def test_plugin_is_light(tmp_path: Path) -> None:
    """`nemo` loads every plugin at every start."""
    code = f"import sys, recipes.entrypoints; print(sorted({FRAMEWORKS} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

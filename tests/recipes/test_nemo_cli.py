"""The `nemo` command finds our plugin; this needs real processes, since `nemo` reads installed entry points."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from nemo_run.cli.api import create_cli
from typer.testing import CliRunner

from recipes.entrypoint_help import readable
from recipes.registry import STEPS

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


@pytest.mark.parametrize(
    ("entry_point", "arguments"),
    [
        ("pretrain", ("model", "data", "trainer", "log", "optim", "resume")),
        ("finetune", ("model", "data", "trainer", "base", "may_lack")),
        ("collect", ("output_dir", "config", "videos")),
        ("curate", ("input_dir", "output_dir", "executor")),
        ("generate", ("prompt", "checkpoint", "first_frame", "negative_prompt")),
        *((name, ()) for name in sorted(set(STEPS) - {"collect", "curate", "generate"})),
    ],
)
def test_help_lists_the_arguments(
    entry_point: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    app = create_cli(nested_entrypoints_creation=False)
    shown = CliRunner().invoke(app, ["cosmos", entry_point, "--help"])
    assert shown.exit_code == 0, shown.exception
    table = shown.stdout.partition("Arguments ")[2]
    assert table
    for argument in arguments:
        assert f" {argument} " in table, table
    assert "slurm_cpu" in table


def test_types_are_shown_as_one_would_write_them() -> None:
    assert readable(Path | str | None) == "Path | str | None"
    assert readable(Literal["bf16-mixed", "32"] | None) == "'bf16-mixed' | '32' | None"
    assert readable(Callable[..., Path]) == "Callable[..., Path]"
    assert readable(list[str]) == "list[str]"

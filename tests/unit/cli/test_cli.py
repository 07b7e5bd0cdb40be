import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from nemo_cosmos.cli.main import app

COMMANDS = (
    *("quickstart", "collect", "curate", "tokenize", "train", "generate"),
    *("convert", "evaluate", "guard", "recipes", "doctor"),
)


def test_every_public_command_has_help():
    runner = CliRunner()
    listed = runner.invoke(app, ["--help"]).output
    for command in COMMANDS:
        assert command in listed
        assert runner.invoke(app, [command, "--help"]).exit_code == 0


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys; from nemo_cosmos.cli.main import app; "
        "print([m for m in ('torch', 'nemo', 'megatron', 'nemo_curator', 'mujoco') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("command", [["curate"], ["train", "diffusion_tiny_pretrain"]])
def test_a_user_error_is_one_line_and_status_two(command, tmp_path):
    arguments = [str(tmp_path), str(tmp_path / "out")] if command == ["curate"] else [f"data.path={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "nemo_cosmos.cli.main", *command, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("nemo-cosmos: error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("prompt", "status"), [("A red car turns left.", 0), ("", 1)])
def test_guard_prompt_tells_by_its_exit_status(prompt, status):
    result = CliRunner().invoke(app, ["guard", "prompt", prompt, "--json"])
    assert result.exit_code == status
    assert all(set(v) == {"guard", "safe", "reason", "scores"} for v in json.loads(result.stdout).values())


@pytest.mark.parametrize(
    ("flags", "batch_size", "views"),
    [([], 8, ("front", "side")), (["--batch-size", "2", "--views", "rear, left"], 2, ("rear", "left"))]
    + [(["--views", "all"], 8, None)],
)
def test_the_latent_caches_batch_size_and_views_can_be_set(flags, batch_size, views, monkeypatch):
    from nemo_cosmos.steps import tokenize

    seen = {}
    monkeypatch.setattr(tokenize, "tokenize", lambda *_, **given: seen.update(given))
    result = CliRunner().invoke(app, ["tokenize", "curated", "latents", *flags])
    assert result.exit_code == 0, result.output
    assert (seen["config"].batch_size, seen["config"].views) == (batch_size, views)

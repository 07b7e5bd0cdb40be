"""What each executor makes of a recipe, rendered by nemo-run itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import fiddle
import nemo_run as run
import pytest

from nemo_cosmos.errors import UserError
from recipes import executors
from recipes.launch import configure


@pytest.fixture(autouse=True)
def quiet_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """nemo-run's tunnel reads standard input, and its tables break lines at the terminal's width."""
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        monkeypatch.setenv("COLUMNS", "2000")
        yield


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    settings = tmp_path / "executors.yaml"
    settings.write_text(
        "slurm:\n"
        "  account: physics\n"
        "  partition: h100\n"
        "  cpu_partition: cpu\n"
        "  nodes: 4\n"
        "  container_image: registry/nemo-cosmos:1\n"
        "  container_mounts: [/lustre/me/runs:/opt/nemo_cosmos/runs]\n"
        "docker:\n"
        "  container_image: nemo-cosmos:1\n"
        "  volumes: [/data:/data]\n"
    )
    monkeypatch.setenv(executors.SETTINGS_VARIABLE, str(settings))
    return tmp_path


def rendered(recipe: run.Partial, executor: run.Config, folder: Path, capsys: pytest.CaptureFixture) -> str:
    """Dry-runs an experiment of one task and returns what nemo-run prints, with line breaks of its tables undone."""
    with run.Experiment("cosmos", base_dir=str(folder / "experiments")) as experiment:
        experiment.add(recipe, executor=fiddle.build(executor), name="train")
        experiment.dryrun()
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.fixture
def recipe() -> Iterator[run.Partial]:
    return configure("diffusion_tiny_pretrain", ["trainer.max_steps=5", "trainer.devices=8", "trainer.num_nodes=4"])


def test_slurm_renders_a_multi_node_torchrun_job(
    recipe: run.Partial, site: Path, capsys: pytest.CaptureFixture
) -> None:
    script = rendered(recipe, executors.slurm(), site, capsys)
    for line in (
        "#SBATCH --account=physics",
        "#SBATCH --partition=h100",
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --exclusive",
        "#SBATCH --time=04:00:00",
        "export CUDA_DEVICE_MAX_CONNECTIONS=1",
        "--container-image registry/nemo-cosmos:1",
        "--container-mounts /lustre/me/runs:/opt/nemo_cosmos/runs,",
        "--nnodes 4 --nproc-per-node 8 --node-rank $SLURM_NODEID",
        "-m nemo_run.core.runners.fdl_runner -n train",
    ):
        assert line in script, line


def test_slurm_cpu_renders_an_array_job_without_torchrun(site: Path, capsys: pytest.CaptureFixture) -> None:
    executor = executors.slurm_cpu()
    executor.array = "0-7"
    script = rendered(configure("curate_part", []), executor, site, capsys)
    assert "#SBATCH --array=0-7" in script
    assert "#SBATCH --partition=cpu" in script
    assert "gpus-per-node" not in script
    assert "torchrun" not in script


def test_curation_over_several_nodes_starts_once_on_each(site: Path, capsys: pytest.CaptureFixture) -> None:
    executor = executors.slurm_cpu()
    executor.nodes = 4
    script = rendered(configure("curate", ["executor=xenna"]), executor, site, capsys)
    assert "#SBATCH --nodes=4" in script and "#SBATCH --ntasks-per-node=1" in script
    (step,) = re.findall(r"srun ((?:(?!srun ).)*?) python -m nemo_run.core.runners.fdl_runner", script)
    # Nothing that would keep the step to fewer nodes, or start it twice on one.
    assert not re.search(r"--(ntasks|nodes)|-[nN] ", step)


def test_slurm_submits_through_ssh_where_a_host_is_named(site: Path) -> None:
    settings = Path(os.environ[executors.SETTINGS_VARIABLE])
    settings.write_text("slurm:\n  account: a\n  host: login.example\n  user: me\n  job_dir: /lustre/me/jobs\n")
    tunnel = fiddle.build(executors.slurm()).tunnel
    assert (type(tunnel), tunnel.host, tunnel.user) == (run.SSHTunnel, "login.example", "me")
    assert tunnel.job_dir == "/lustre/me/jobs"


def test_docker_renders_a_container_with_gpus(recipe: run.Partial, site: Path, capsys: pytest.CaptureFixture) -> None:
    script = rendered(recipe, executors.docker(), site, capsys)
    for line in (
        "container_image: nemo-cosmos:1",
        "volumes: - /data:/data",
        "runtime: nvidia",
        "num_gpus: -1",
        "ipc_mode: host",
        "shm_size: 16g",
        "command: - python - -m - nemo_run.core.runners.fdl_runner - -n - train",
    ):
        assert line in re.sub("&id[0-9]+ ", "", script), line  # YAML anchors


def test_local_torchrun_starts_one_process_per_rank(
    recipe: run.Partial, site: Path, capsys: pytest.CaptureFixture
) -> None:
    executor = executors.local_torchrun()
    executor.ntasks_per_node = 4
    script = rendered(recipe, executor, site, capsys)
    assert "torchrun" in script
    assert "'--nnodes', '1', '--nproc-per-node', '4'" in script
    assert "fdl_runner" in script


def test_local_runs_a_step_in_a_process_of_its_own(site: Path, tmp_path: Path) -> None:
    from nemo_cosmos.files import write_json

    written = tmp_path / "written.json"
    with run.Experiment("cosmos", base_dir=str(site / "experiments")) as experiment:
        task = run.Partial(write_json, path=str(written), value={"answer": 42})
        experiment.add(task, executor=fiddle.build(executors.local()), name="write")
        experiment.run(sequential=True)
    assert '"answer": 42' in written.read_text()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("local", run.LocalExecutor),
        ("local_torchrun", run.LocalExecutor),
        ("docker", run.DockerExecutor),
        ("slurm", run.SlurmExecutor),
        ("slurm_cpu", run.SlurmExecutor),
    ],
)
def test_short_name_is_found_by_the_command_line(name: str, kind: type, site: Path) -> None:
    context = run.cli.RunContext(name="train")
    executor = fiddle.build(context.parse_executor(name, "ntasks_per_node=3"))
    assert (type(executor), executor.ntasks_per_node) == (kind, 3)


def test_unknown_setting_is_refused(site: Path) -> None:
    Path(os.environ[executors.SETTINGS_VARIABLE]).write_text("slurm:\n  acount: physics\n")
    with pytest.raises(UserError, match=r"section slurm: got \['acount'\].*'account'"):
        executors.slurm()


def test_missing_settings_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(executors.SETTINGS_VARIABLE, "/nowhere/executors.yaml")
    with pytest.raises(UserError, match="/nowhere/executors.yaml: cannot be read"):
        executors.docker()


def test_settings_of_the_repository_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(executors.SETTINGS_VARIABLE, raising=False)
    for factory in (executors.local, executors.local_torchrun, executors.docker, executors.slurm, executors.slurm_cpu):
        fiddle.build(factory())

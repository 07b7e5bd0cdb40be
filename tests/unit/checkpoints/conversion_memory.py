"""Measures what conversions take; run in a process of its own, whose imports are done before.

    python conversion_memory.py FOLDER model.pt:nemo:nemo nemo:diffusers:diffusers ...

prints for each `source:target:format` the most bytes of memory that it had beyond what the process had before it.
"""

import sys
from pathlib import Path

from nemo_cosmos.checkpoints.convert import convert


def resident(field: str) -> int:
    """VmRSS, what is in memory now, or VmHWM, the most that ever was; in bytes. Mapped files count, where read."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(folder: Path, *steps: str) -> None:
    """Converts small weights first, so that what is imported late and what libraries keep is there already."""
    for step in steps:
        source, target, to = step.split(":")
        convert("diffusion_tiny_text2world", folder / f"small_{target}", to=to)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        before = resident("VmRSS")
        convert(folder / source, folder / target, to=to)
        print(step, resident("VmHWM") - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

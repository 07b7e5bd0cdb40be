"""Measures what a conversion takes; run in a process of its own, since a peak counts from a process's start.

    python conversion_memory.py SOURCE TARGET FORMAT

prints the most bytes of memory that the conversion had beyond what the process had before it.
"""

import sys
from pathlib import Path

from nemo_cosmos.checkpoints.convert import convert


def resident(field: str) -> int:
    """VmRSS, what is in memory now, or VmHWM, the most that ever was; in bytes. Mapped files count, where read."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(source: str, target: str, to: str) -> None:
    """Converts small weights first, so that what is imported late and what libraries keep is there already."""
    convert("diffusion_tiny_text2world", f"{target}.warm-up{Path(target).suffix}", to=to)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = resident("VmRSS")
    convert(source, target, to=to)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])

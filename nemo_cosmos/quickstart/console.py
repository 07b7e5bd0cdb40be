"""What the quickstart's console shows of the frameworks: their errors."""

from __future__ import annotations

import logging
import warnings


def quiet_frameworks() -> None:
    """Keeps off the console what frameworks say, at every start of a process, of their optional parts and settings."""
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron|torch.distributed")
    if logging.lastResort is not None:  # prints for all loggers that no one has set up
        logging.lastResort.setLevel(logging.ERROR)
    from nemo.utils import logging as nemo_logging

    nemo_logging.set_verbosity(nemo_logging.ERROR)

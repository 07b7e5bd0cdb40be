"""What the quickstart's console shows of the frameworks: their errors."""

from __future__ import annotations

import logging
import warnings


def quiet_frameworks() -> None:
    """Keeps off the console what frameworks say, at every start of a process, of their optional parts and settings.

    Python's warnings go with it, for NeMo hands them to its own logger. What this project has to say it raises.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron|torch.distributed")
    logging.basicConfig()
    for handler in logging.getLogger().handlers:  # these print for all loggers that no one has set up
        handler.setLevel(logging.ERROR)
    from nemo.utils import logging as nemo_logging

    nemo_logging.set_verbosity(nemo_logging.ERROR)

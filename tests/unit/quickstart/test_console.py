import subprocess
import sys

SCRIPT = """
import logging, warnings
from nemo_cosmos.quickstart.console import quiet_frameworks
quiet_frameworks()
from nemo.utils import logging as nemo_logging
logging.getLogger("some.framework").warning("talk of a library")
nemo_logging.warning("talk of NeMo")
warnings.warn_explicit("talk of Megatron", UserWarning, "utils.py", 1, module="megatron.core.utils")
logging.getLogger("some.framework").error("error of a library")
nemo_logging.error("error of NeMo")
"""


def test_errors_show_but_no_talk() -> None:
    # In a process of its own, since it changes the settings of all loggers.
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    shown = done.stdout + done.stderr
    assert "talk of" not in shown
    assert "error of a library" in shown
    assert "error of NeMo" in shown

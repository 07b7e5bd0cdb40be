"""What fails on one clip or video without ending the run for all others."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator

from curator_stages.sources import said_by
from curator_stages.tasks import Clip, StageOrderError
from nemo_cosmos.errors import UserError

_LONGEST_REASON = 300
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def failing_alone(clip: Clip, stage: str) -> Iterator[None]:
    """Rejects a clip that the block fails on, for the next run to try anew.

    Args:
        clip: What the block works on.
        stage: Whose block it is.

    Raises:
        Exception: What `reason_of` does not take for the clip's own.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a decoder or network may raise anything
        clip.fail(stage, reason_of(error, stage, clip.record.source_video))


def reason_of(error: Exception, stage: str, name: str) -> str:
    """Says an unforeseen error in one line; its traceback goes to the log.

    Args:
        error: What a stage raised.
        stage: Which one.
        name: The video that it was at work on.

    Returns:
        Kind of the error and its words.

    Raises:
        Exception: The error itself, where it would come back with every clip: what the user is to mend, a missing
            package, stages in a wrong order, a full disk, a GPU that this process can no longer use.
    """
    if _concerns_all(error):
        raise error
    _log.warning("%s: %s failed; the rest goes on.", name, stage, exc_info=error)
    return f"{type(error).__name__}: {said_by(error)}"[:_LONGEST_REASON]


def _concerns_all(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    is_lost_gpu = type(error).__name__ == "AcceleratorError"  # torch's, which need not be imported
    return is_lost_gpu or isinstance(error, UserError | ImportError | StageOrderError)

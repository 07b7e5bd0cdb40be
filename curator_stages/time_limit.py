"""Calls into code that may never return, such as a decoder's or a file system's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def within(timeout_s: float, work: Callable[[], _T]) -> _T:
    """Returns what `work` returns, unless that takes too long.

    A thread of its own does the work. One that is late is left behind: it ends when what it waits for returns, at the
    latest with the process. So nothing that it still changes may be used afterwards.

    Args:
        timeout_s: Longest wait in seconds.
        work: What to do.

    Raises:
        TimeoutError: It took longer.
        BaseException: What `work` raised.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            errors.append(error)

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"nothing came back for {timeout_s:g} s")
    return results[0]

"""Runs one step in a process of its own: its memory is its own, and a kill leaves the others alone."""

from __future__ import annotations

import multiprocessing
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation.resources import StepResources, measured
from nemo_cosmos.quickstart.console import quiet_frameworks

if TYPE_CHECKING:
    import nemo_run as run


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a step returned and used."""

    result: Any
    resources: StepResources


def run_recipe(recipe: run.Partial) -> Finished:
    """Runs a nemo-run recipe in a fresh Python process and waits for it.

    Args:
        recipe: The whole configuration of a step.

    Returns:
        What its function returned, the time it took and its peak memory.

    Raises:
        UserError: The step found bad input.
        RuntimeError: The step failed otherwise, or was killed; the message tells.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(recipe, sender))
    with measured() as resources:
        process.start()
        sender.close()
        try:
            kind, value = receiver.recv()
        except EOFError:
            kind, value = "died", None
        process.join()
    if kind == "user error":
        raise UserError(value)
    if kind != "result":
        raise RuntimeError(value or f"the step's process ended with status {process.exitcode}, out of memory perhaps")
    return Finished(result=value, resources=resources)


def _in_child(recipe: run.Partial, sender: Connection) -> None:
    quiet_frameworks()
    import fiddle

    try:
        sender.send(("result", fiddle.build(recipe)()))
    except UserError as error:
        sender.send(("user error", str(error)))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
        raise SystemExit(1) from None

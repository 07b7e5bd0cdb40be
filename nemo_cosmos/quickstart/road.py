"""The steps of the road, in order, each finished once."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation.report import QuickstartSummary, StepSummary, write_report
from nemo_cosmos.evaluation.resources import describe_machine
from nemo_cosmos.files import read_json, write_json
from nemo_cosmos.quickstart import measures, plan
from nemo_cosmos.quickstart.config import QuickstartConfig
from nemo_cosmos.quickstart.process import run_recipe

if TYPE_CHECKING:
    import nemo_run as run


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: how to configure it and what to say of it."""

    name: str
    recipe: Callable[[QuickstartConfig], run.Partial]
    measures: Callable[[QuickstartConfig, Any], dict[str, float | str]]
    """Takes the result of the recipe's function."""


STEPS = (
    Step(name="collect", recipe=plan.collect, measures=measures.of_collection),
    Step(name="curate", recipe=plan.curate, measures=measures.of_curation),
    Step(name="train tokenizer", recipe=plan.train_tokenizer, measures=measures.of_tokenizer_training),
    Step(name="evaluate tokenizer", recipe=plan.evaluate_tokenizer, measures=measures.of_tokenizer),
    Step(name="tokenize", recipe=plan.tokenize, measures=measures.of_latents),
    Step(name="pretrain WFM", recipe=plan.pretrain, measures=measures.of_pretraining),
    Step(name="post-train WFM", recipe=plan.finetune, measures=measures.of_finetuning),
    Step(name="evaluate WFM", recipe=plan.evaluate, measures=measures.of_prediction),
    Step(name="generate", recipe=plan.generate, measures=measures.of_generation),
)


def run_quickstart(config: QuickstartConfig) -> tuple[Path, QuickstartSummary]:
    """Runs the steps that are not finished yet, then writes the report.

    Args:
        config: Where, and how much.

    Returns:
        The report's path and what it shows.

    Raises:
        UserError: A step found bad input, or the folder belongs to another configuration.
    """
    _claim(config)
    console = Console(stderr=True)
    done = []
    for number, step in enumerate(STEPS, start=1):
        mark = config.output / "steps" / f"{number}_{step.name.replace(' ', '_')}.json"
        if mark.exists():
            console.print(f"[{number}/{len(STEPS)}] {step.name}: already done")
        else:
            console.print(f"[{number}/{len(STEPS)}] {step.name}")
            write_json(mark, _run(step, config).to_dict())
        done.append(StepSummary.from_dict(read_json(mark)))
    summary = QuickstartSummary(
        command=_command(), machine=describe_machine(), steps=tuple(done), **measures.for_report(config)
    )
    write_json(config.output / "summary.json", summary.to_dict())
    return write_report(config.output / "report.html", summary), summary


def _run(step: Step, config: QuickstartConfig) -> StepSummary:
    finished = run_recipe(step.recipe(config))
    return StepSummary(
        name=step.name,
        seconds=finished.resources.seconds,
        peak_memory_mb=finished.resources.peak_memory_mb,
        measures=step.measures(config, finished.result),
    )


def _claim(config: QuickstartConfig) -> None:
    """Marks the folder with what shall be made in it, or checks that it is the same."""
    values = {
        name: str(value) for name, value in dataclasses.asdict(config).items() if name not in ("output", "workers")
    }
    path = config.output / "quickstart.json"
    if not path.exists():
        write_json(path, values)
    elif (found := read_json(path)) != values:
        raise UserError(
            f"--output {config.output}: was begun with {found}, but now it would be {values}. "
            "Give another folder, or delete this one."
        )


def _command() -> str:
    return " ".join(["nemo-cosmos", *sys.argv[1:]])

"""quickstart: the whole road in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_cosmos.cli.output import Json, show


def add_to(app: typer.Typer) -> None:
    """Adds this file's command."""
    app.command()(quickstart)


def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for all that is made; again the same one goes on.")] = Path(
        "runs/quickstart"
    ),
    videos: Annotated[Path | None, typer.Option(help="Your own videos instead of the packaged clips.")] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Train anew; takes two hours.")] = False,
    seed: Annotated[int, typer.Option(help="Of the training rollouts and of the noise.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Simulator processes.")] = 2,
    as_json: Json = False,
) -> None:
    """Real video to a generated, guarded, measured video, on this machine, in under 20 minutes."""
    from nemo_cosmos.quickstart.config import QuickstartConfig
    from nemo_cosmos.quickstart.console import quiet_frameworks

    config = QuickstartConfig(output=output, videos=videos, from_scratch=from_scratch, seed=seed, workers=workers)
    quiet_frameworks()
    from nemo_cosmos.quickstart.road import run_quickstart

    report, summary = run_quickstart(config)
    if as_json:
        show({"report": str(report), **summary.to_dict()}, as_json=True)
        return
    from nemo_cosmos.evaluation.report import print_summary

    print_summary(summary)
    typer.echo(f"\nReport: {report}")

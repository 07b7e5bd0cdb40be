from __future__ import annotations

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation.report import MediaFile, QuickstartSummary, print_summary, step_rows, write_report


def test_the_report_holds_everything_and_nothing_from_outside(tmp_path, summary):
    text = write_report(tmp_path / "report.html", summary).read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|@import", text)
    for title in (
        "Steps",
        "What it generates",
        "Prediction of held-out rollouts",
        "Do the actions matter?",
        "Tokenizer",
        "Training",
        "Guards",
        "Machine",
    ):
        assert f"<h2>{title}</h2>" in text
    assert text.count("<video") == 4
    assert text.count("data:image/png") == 1
    # An interval chart and a curve by frame for each of three measures, and two loss curves.
    assert text.count("data:image/svg+xml") == 8
    assert "WFM with actions minus repeat last frame" in text
    assert "UNSAFE" in text


def test_the_best_tokenizer_row_is_marked(tmp_path, summary):
    text = write_report(tmp_path / "report.html", summary).read_text(encoding="utf-8")
    assert '<td class="number best">27.31</td>' in text
    assert '<td class="number">24.02</td>' in text


def test_parts_that_were_not_run_are_left_out(tmp_path, summary):
    bare = QuickstartSummary(command=summary.command, machine=summary.machine, steps=summary.steps)
    text = write_report(tmp_path / "report.html", bare).read_text(encoding="utf-8")
    assert re.findall("<h2>([^<]+)</h2>", text) == ["Steps", "Machine"]


def test_the_summary_goes_through_json(summary):
    assert QuickstartSummary.from_dict(json.loads(json.dumps(summary.to_dict()))) == summary


def test_a_missing_video_is_named(tmp_path, summary):
    broken = dataclasses.replace(summary, videos=(MediaFile(path="gone.mp4", caption="gone"),))
    with pytest.raises(UserError, match=r"gone\.mp4"):
        write_report(tmp_path / "report.html", broken)
    assert not (tmp_path / "report.html").exists()


def test_steps_are_summed_up(summary):
    headers, rows = step_rows(summary)
    assert headers == ["step", "time", "peak MB", "measures"]
    # Times have spaces that no line is broken at.
    assert rows[0] == ["collect", "41.0\xa0s", 410, "videos 56, hours 0.31"]
    assert rows[-1] == ["all", "7\xa0min\xa050\xa0s", 2210, ""]


def test_the_terminal_shows_the_same_tables(summary):
    output = io.StringIO()
    print_summary(summary, Console(file=output, width=160))
    shown = output.getvalue()
    for text in ("collect", "clips kept 188", "CV8x8x8-tiny", "WFM with actions", "shuffled actions", "UNSAFE"):
        assert text in shown

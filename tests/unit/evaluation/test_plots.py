from __future__ import annotations

import numpy as np
import pytest

from nemo_cosmos.errors import UserError
from nemo_cosmos.evaluation.plots import interval_chart, loss_curve, per_frame_curves, read_losses


def test_losses_of_a_resumed_run_are_read_once(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "val_loss": 9}\n\n{"step": 2, "loss": 1.5}\n'
    )
    steps, losses = read_losses(log)
    assert steps.tolist() == [1, 2]
    assert losses.tolist() == [3.0, 1.5]


@pytest.mark.parametrize(
    ("content", "message"), [("", "at least one line"), ('{"step": 1, "lo', "line 1"), (None, "existing")]
)
def test_logs_that_cannot_be_read_are_refused(tmp_path, content, message):
    log = tmp_path / "log.jsonl"
    if content is not None:
        log.write_text(content)
    with pytest.raises(UserError, match=message):
        read_losses(log)


def test_the_smoothed_curve_of_a_constant_is_the_constant(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(f'{{"step": {step}, "loss": 0.7}}' for step in range(50)))
    raw, smooth = loss_curve({"run": log}).axes[0].lines
    np.testing.assert_allclose(raw.get_ydata(), 0.7)
    np.testing.assert_allclose(smooth.get_ydata(), 0.7)


def test_charts_show_every_method(evaluation_of):
    evaluation = evaluation_of({"close": 2.4, "far": 0.5}, num_videos=3)
    curves = per_frame_curves(evaluation).axes[0]
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["close", "far", "repeat last frame"]
    np.testing.assert_allclose(curves.lines[1].get_ydata(), evaluation.method("far").measure("PSNR").per_frame)
    chart = interval_chart(evaluation, "SSIM").axes[0]
    assert [label.get_text() for label in chart.get_yticklabels()] == ["close", "far", "repeat last frame"]
    assert chart.get_xlabel() == "SSIM"

"""How well a WFM predicts held-out rollouts, and whether it obeys the actions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from nemo_cosmos.evaluation.video_prediction import (
    MEASURES,
    PredictionEvaluation,
    evaluate_predictions,
    repeat_last_frame,
)
from nemo_cosmos.files import write_json
from nemo_cosmos.generation.open import find_world_model, open_world_model
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.generation.world_model import WorldModel
from nemo_cosmos.html_page import frame_sheet
from nemo_cosmos.steps.evaluate_tokenizer import reconstruct
from nemo_cosmos.steps.heldout import HeldOutWindow, held_out_windows
from nemo_cosmos.video_io import write_video

MODEL, SHUFFLED, REPEAT, UNCONDITIONAL, CEILING = (
    "WFM, right actions",
    "WFM, shuffled actions",
    "repeat last frame",
    "unconditional WFM",
    "tokenizer alone",
)
"""Names of the methods in results; the last rebuilds the truth and bounds what any WFM on these latents can reach."""


def evaluate_wfm(
    curated: str | Path,
    output: str | Path,
    *,
    checkpoint: str | Path = "diffusion_tiny_action",
    unconditional: str | Path = "diffusion_tiny_text2world",
    tokenizer: str | Path = "tokenizer_tiny",
    num_clips: int = 32,
    sampling: SamplingConfig | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Predicts held-out windows from their first frame and actions, and compares.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: Folder for `prediction.json`, `actions.json`, `prediction_by_source.json` (method, source, measure), and
            for each source a frame sheet and videos.
        checkpoint: The action-conditioned WFM.
        unconditional: A WFM that is given neither frames nor actions nor text.
        tokenizer: Anything `load_tokenizer` takes.
        num_clips: At most this many windows.
        sampling: Sizes, steps and seed.
        batch_size: Windows predicted at once.

    Returns:
        Mean of each measure by method.
    """
    output, sampling = Path(output), find_world_model(checkpoint, tokenizer).complete(sampling)
    windows = held_out_windows(
        curated,
        num_windows=num_clips,
        num_frames=sampling.num_frames,
        height=sampling.height,
        width=sampling.width,
        with_actions=True,
    )
    predictions = _predict_all(windows, checkpoint, unconditional, tokenizer, sampling, batch_size)
    truth = [window.frames for window in windows]
    all_methods = evaluate_predictions(truth, predictions, perceptual_stride=4)
    compared = _only(all_methods, (MODEL, REPEAT, UNCONDITIONAL, CEILING))
    write_json(output / "prediction.json", compared.to_dict())
    write_json(output / "actions.json", _only(all_methods, (MODEL, SHUFFLED)).to_dict())
    write_json(output / "prediction_by_source.json", by_source(all_methods, [window.source for window in windows]))
    _show(output, windows, predictions, sampling.fps)
    return {
        method.method: {measure: method.measure(measure).over_videos.mean for measure in MEASURES}
        for method in all_methods.methods
    }


def _predict_all(
    windows: list[HeldOutWindow],
    checkpoint: str | Path,
    unconditional: str | Path,
    tokenizer: str | Path,
    sampling: SamplingConfig,
    batch_size: int,
) -> dict[str, list[np.ndarray]]:
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    other_actions = shuffled_actions(windows)
    predictions: dict[str, list[np.ndarray]] = {}
    with open_world_model(checkpoint, tokenizer) as model:
        right = [window.actions for window in windows]
        for name, actions in ((MODEL, right), (SHUFFLED, other_actions)):
            rows = [np.stack(actions[i : i + batch_size]) for i in range(0, len(windows), batch_size)]
            pairs = enumerate(zip(batches, rows, strict=True))
            predictions[name] = [
                v for i, (b, a) in pairs for v in _predict(model, b, a, sampling, first=i * batch_size)
            ]
        predictions[REPEAT] = [repeat_last_frame(w.frames[:1], sampling.num_frames) for w in windows]
        predictions[CEILING] = model.tokenizer.use(lambda t: [reconstruct(t, w.frames) for w in windows])
    with open_world_model(unconditional, tokenizer) as model:
        predictions[UNCONDITIONAL] = [
            video
            for i, batch in enumerate(batches)
            for video in _predict(model, batch, None, sampling, first=i * batch_size, conditional=False)
        ]
    return predictions


def _predict(
    model: WorldModel,
    windows: list[HeldOutWindow],
    actions: np.ndarray | None,
    sampling: SamplingConfig,
    *,
    first: int,
    conditional: bool = True,
) -> list[np.ndarray]:
    return model.generate(
        [window.caption if conditional else "" for window in windows],
        dataclasses.replace(sampling, fps=windows[0].fps),
        first_frames=[window.frames[:1] for window in windows] if conditional else None,
        actions=actions,
        seeds=[sampling.seed + first + i for i in range(len(windows))],
        progress=True,
    )


def shuffled_actions(windows: list[HeldOutWindow]) -> list[np.ndarray]:
    """Gives each window the actions of another one of its own domain: the next but half of them around.

    Half-way round is as far as possible, so neighbours cut from one rollout, whose actions are alike, do not swap.
    """
    given: list[np.ndarray] = [window.actions for window in windows]  # type: ignore[misc]
    for source in {window.source for window in windows}:
        places = [i for i, window in enumerate(windows) if window.source == source]
        for position, place in enumerate(places):
            given[place] = windows[places[(position + len(places) // 2) % len(places)]].actions  # type: ignore[assignment]
    return given


def by_source(evaluation: PredictionEvaluation, sources: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Means over the videos of each domain alone.

    Args:
        evaluation: Of all videos.
        sources: Domain of each video.

    Returns:
        Mean by method, domain and measure.
    """
    places = {source: [i for i, of in enumerate(sources) if of == source] for source in sorted(set(sources))}
    return {
        method.method: {
            source: {m.measure: float(np.mean([m.per_video[i] for i in of_source])) for m in method.measures}
            for source, of_source in places.items()
        }
        for method in evaluation.methods
    }


def _only(evaluation: PredictionEvaluation, methods: tuple[str, ...]) -> PredictionEvaluation:
    return dataclasses.replace(evaluation, methods=tuple(evaluation.method(name) for name in methods))


def _show(output: Path, windows: list[HeldOutWindow], predictions: dict[str, list[np.ndarray]], fps: float) -> None:
    """Writes, for one window of each domain, a frame sheet and the videos."""
    import cv2

    for source in sorted({window.source for window in windows}):
        index = next(i for i, window in enumerate(windows) if window.source == source)
        rows = {"truth": windows[index].frames, **{name: videos[index] for name, videos in predictions.items()}}
        sheet = frame_sheet(list(rows.values()), labels=list(rows), columns=6)
        cv2.imwrite(str(output / f"{source}.png"), sheet[..., ::-1])
        for name, video in rows.items():
            stem = name.replace(",", "").replace(" ", "_")
            write_video(output / f"{source}_{stem}.mp4", video, fps=fps)

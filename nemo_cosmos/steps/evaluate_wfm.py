"""How well a WFM predicts held-out rollouts, and whether it obeys the actions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from nemo_cosmos.errors import user_error
from nemo_cosmos.evaluation.video_prediction import (
    MEASURES,
    PredictionEvaluation,
    evaluate_predictions,
    mean_over_runs,
    paired_difference,
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
_METHODS = (MODEL, SHUFFLED, REPEAT, CEILING, UNCONDITIONAL)
_SAMPLED = (MODEL, SHUFFLED, UNCONDITIONAL)
"""Those that draw noise."""


def evaluate_wfm(
    curated: str | Path,
    output: str | Path,
    *,
    checkpoint: str | Path = "diffusion_tiny_action",
    unconditional: str | Path = "diffusion_tiny_text2world",
    tokenizer: str | Path = "tokenizer_tiny",
    num_clips: int = 32,
    num_seeds: int = 1,
    sampling: SamplingConfig | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Predicts held-out windows from their first frame and actions, and compares.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: Folder for `prediction.json`, `actions.json`, `prediction_by_source.json` (method, source, measure),
            `prediction_by_seed.json` (method, one value a seed), `differences.json` (method, measure: what the WFM with
            the right actions has more than it, window by window), and for each source a frame sheet and videos.
        checkpoint: The action-conditioned WFM.
        unconditional: A WFM that is given neither frames nor actions nor text.
        tokenizer: Anything `load_tokenizer` takes.
        num_clips: At most this many windows.
        num_seeds: So many predictions of each window by each WFM, each from noise of its own; measures are their means.
        sampling: Sizes, steps and seed.
        batch_size: Windows predicted at once.

    Returns:
        Mean of each measure by method.
    """
    if num_seeds < 1:
        raise user_error("num_seeds", num_seeds, "at least 1", "Ask for one prediction of each window or more.")
    output, sampling = Path(output), find_world_model(checkpoint, tokenizer).complete(sampling)
    windows = held_out_windows(
        curated,
        num_windows=num_clips,
        num_frames=sampling.num_frames,
        height=sampling.height,
        width=sampling.width,
        with_actions=True,
    )
    predictions = _predict_all(windows, checkpoint, unconditional, tokenizer, sampling, batch_size, num_seeds)
    all_runs = evaluate_predictions([window.frames for window in windows], predictions, perceptual_stride=4)
    all_methods = all_runs
    for method in _SAMPLED:
        all_methods = mean_over_runs(all_methods, method, _runs(method, num_seeds))
    compared = _only(all_methods, (MODEL, REPEAT, UNCONDITIONAL, CEILING))
    write_json(output / "prediction.json", compared.to_dict())
    write_json(output / "actions.json", _only(all_methods, (MODEL, SHUFFLED)).to_dict())
    write_json(output / "prediction_by_source.json", by_source(all_methods, [window.source for window in windows]))
    write_json(output / "prediction_by_seed.json", _by_seed(all_runs, num_seeds))
    write_json(output / "differences.json", _differences(all_methods))
    _show(output, windows, predictions, sampling.fps)
    return _means(all_methods)


def _means(evaluation: PredictionEvaluation) -> dict[str, dict[str, float]]:
    return {
        method.method: {measure: method.measure(measure).over_videos.mean for measure in MEASURES}
        for method in evaluation.methods
    }


def _runs(method: str, num_seeds: int) -> list[str]:
    """Names of a WFM's predictions from each seed."""
    return [f"{method}, seed {seed}" for seed in range(num_seeds)]


def _by_seed(all_runs: PredictionEvaluation, num_seeds: int) -> dict[str, dict[str, list[float]]]:
    means = _means(all_runs)
    return {
        method: {measure: [means[run][measure] for run in _runs(method, num_seeds)] for measure in MEASURES}
        for method in _SAMPLED
    }


def _differences(evaluation: PredictionEvaluation) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        name: {measure: paired_difference(evaluation, MODEL, name, measure).to_dict() for measure in MEASURES}
        for name in (SHUFFLED, REPEAT, UNCONDITIONAL)
    }


def _predict_all(
    windows: list[HeldOutWindow],
    checkpoint: str | Path,
    unconditional: str | Path,
    tokenizer: str | Path,
    sampling: SamplingConfig,
    batch_size: int,
    num_seeds: int,
) -> dict[str, list[np.ndarray]]:
    """Predicted videos by run for the WFMs, by method for the others."""
    right: list[np.ndarray] = [window.actions for window in windows]  # type: ignore[misc]
    others = shuffled_actions(windows)
    predictions: dict[str, list[np.ndarray]] = {}
    with open_world_model(checkpoint, tokenizer) as model:
        for method, actions in ((MODEL, right), (SHUFFLED, others)):
            for seed, run in enumerate(_runs(method, num_seeds)):
                predictions[run] = _predict(model, windows, actions, _seeded(sampling, seed, windows), batch_size)
        predictions[REPEAT] = [repeat_last_frame(w.frames[:1], sampling.num_frames) for w in windows]
        predictions[CEILING] = model.tokenizer.use(lambda t: [reconstruct(t, w.frames) for w in windows])
    with open_world_model(unconditional, tokenizer) as model:
        for seed, run in enumerate(_runs(UNCONDITIONAL, num_seeds)):
            predictions[run] = _predict(model, windows, None, _seeded(sampling, seed, windows), batch_size)
    return predictions


def _seeded(sampling: SamplingConfig, run: int, windows: list[HeldOutWindow]) -> SamplingConfig:
    """No two windows of any two runs start from the same noise."""
    return dataclasses.replace(sampling, seed=sampling.seed + run * len(windows))


def _predict(
    model: WorldModel,
    windows: list[HeldOutWindow],
    actions: list[np.ndarray] | None,
    sampling: SamplingConfig,
    batch_size: int,
) -> list[np.ndarray]:
    """Without actions the WFM is given nothing else either."""
    given = actions is not None
    videos: list[np.ndarray] = []
    for i in range(0, len(windows), batch_size):
        batch = windows[i : i + batch_size]
        videos += model.generate(
            [window.caption if given else "" for window in batch],
            dataclasses.replace(sampling, fps=batch[0].fps),
            first_frames=[window.frames[:1] for window in batch] if given else None,
            actions=np.stack(actions[i : i + batch_size]) if actions is not None else None,
            seeds=[sampling.seed + i + j for j in range(len(batch))],
            progress=True,
        )
    return videos


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
        runs = {method: _runs(method, 1)[0] if method in _SAMPLED else method for method in _METHODS}
        rows = {"truth": windows[index].frames, **{name: predictions[run][index] for name, run in runs.items()}}
        sheet = frame_sheet(list(rows.values()), labels=list(rows), columns=6)
        cv2.imwrite(str(output / f"{source}.png"), sheet[..., ::-1])
        for name, video in rows.items():
            stem = name.replace(",", "").replace(" ", "_")
            write_video(output / f"{source}_{stem}.mp4", video, fps=fps)

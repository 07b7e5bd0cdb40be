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
from nemo_cosmos.generation.autoregressive_world_model import AutoregressiveWorldModel
from nemo_cosmos.generation.open import DiffusionSource, find_world_model, open_world_model
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.generation.world_model import WorldModel
from nemo_cosmos.html_page import frame_sheet
from nemo_cosmos.steps.evaluate_tokenizer import reconstruct
from nemo_cosmos.steps.heldout import HeldOutWindow, held_out_windows
from nemo_cosmos.steps.token_bits import evaluate_token_bits
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
"""Those that draw noise or tokens."""
_UNCONDITIONAL_DIFFUSION = "diffusion_tiny_text2world"


def evaluate_wfm(
    curated: str | Path,
    output: str | Path,
    *,
    checkpoint: str | Path = "diffusion_tiny_action",
    unconditional: str | Path | None = None,
    tokenizer: str | Path | None = None,
    latents: str | Path | None = None,
    num_clips: int = 32,
    num_seeds: int = 1,
    sampling: SamplingConfig | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Predicts held-out windows from their first frame and actions, and compares.

    Of an autoregressive WFM it also measures bits per token, with the right actions and with shuffled ones.

    Args:
        curated: Folder that `nemo-cosmos curate` wrote.
        output: Folder for `prediction.json`, `actions.json`, `prediction_by_source.json` (method, source, measure),
            `prediction_by_seed.json` (method, one value a seed), `differences.json` (method, measure: what the WFM with
            the right actions has more than it, window by window), of an autoregressive WFM `token_bits.json`, and for
            each source a frame sheet and videos.
        checkpoint: The action-conditioned WFM, of either family.
        unconditional: A WFM that is given neither frames nor actions nor text; when absent,
            `diffusion_tiny_text2world` beside a diffusion WFM and none beside an autoregressive one.
        tokenizer: As `find_world_model` takes it, of both WFMs.
        latents: Latent cache or token files that an autoregressive WFM was trained on: token models are counted on them
            and compared by bits per token.
        num_clips: At most this many windows.
        num_seeds: So many predictions of each window by each WFM, each from draws of its own; measures are their means.
        sampling: Sizes, steps and seed.
        batch_size: Windows predicted at once.

    Returns:
        Mean of each measure by method.
    """
    if num_seeds < 1:
        raise user_error("num_seeds", num_seeds, "at least 1", "Ask for one prediction of each window or more.")
    source = find_world_model(checkpoint, tokenizer)
    output, sampling = Path(output), source.complete(sampling)
    if isinstance(source, DiffusionSource):
        unconditional = unconditional or _UNCONDITIONAL_DIFFUSION
        if latents is not None:
            raise user_error("latents", str(latents), "none, for a diffusion WFM has no tokens", "Leave it out.")
    windows = held_out_windows(
        curated,
        num_windows=num_clips,
        num_frames=sampling.num_frames,
        height=sampling.height,
        width=sampling.width,
        with_actions=True,
    )
    bits = None
    with open_world_model(source) as model:
        if isinstance(model, AutoregressiveWorldModel):
            bits = evaluate_token_bits(
                model,
                windows,
                {MODEL: _actions(windows), SHUFFLED: shuffled_actions(windows)},
                latents=latents,
                num_frames=min(sampling.num_frames, sampling.chunk_frames),
                batch_size=batch_size,
            )
        predictions = _predict_all(model, windows, sampling, batch_size, num_seeds)
    if unconditional is not None:
        with open_world_model(unconditional, tokenizer) as model:
            for seed, run in enumerate(_runs(UNCONDITIONAL, num_seeds)):
                predictions[run] = _predict(model, windows, None, _seeded(sampling, seed, windows), batch_size)
    all_runs = evaluate_predictions([window.frames for window in windows], predictions, perceptual_stride=4)
    means = _write_measures(output, all_runs, bits, [window.source for window in windows], num_seeds)
    _show(output, windows, predictions, sampling.fps)
    return means


def _write_measures(
    output: Path,
    all_runs: PredictionEvaluation,
    bits: PredictionEvaluation | None,
    sources: list[str],
    num_seeds: int,
) -> dict[str, dict[str, float]]:
    """Writes all files of numbers; returns the mean of each measure by method."""
    measured = {result.method for result in all_runs.methods}
    sampled = [name for name in _SAMPLED if measured.issuperset(_runs(name, 1))]
    all_methods = all_runs
    for method in sampled:
        all_methods = mean_over_runs(all_methods, method, _runs(method, num_seeds))
    told = [all_methods] if bits is None else [all_methods, bits]
    compared = _only(all_methods, (MODEL, REPEAT, UNCONDITIONAL, CEILING))
    write_json(output / "prediction.json", compared.to_dict())
    write_json(output / "actions.json", _only(all_methods, (MODEL, SHUFFLED)).to_dict())
    write_json(output / "prediction_by_source.json", _joined([by_source(of, sources) for of in told]))
    write_json(output / "prediction_by_seed.json", _by_seed(all_runs, sampled, num_seeds))
    write_json(output / "differences.json", _joined([_differences(of) for of in told]))
    if bits is not None:
        write_json(output / "token_bits.json", bits.to_dict())
    return _joined([_means(of) for of in told])


def _joined(tables: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Puts the measures of each method together."""
    methods = dict.fromkeys(name for table in tables for name in table)
    return {name: {key: value for table in tables for key, value in table.get(name, {}).items()} for name in methods}


def _means(evaluation: PredictionEvaluation) -> dict[str, dict[str, float]]:
    return {
        method.method: {measure.measure: measure.over_videos.mean for measure in method.measures}
        for method in evaluation.methods
    }


def _runs(method: str, num_seeds: int) -> list[str]:
    """Names of a WFM's predictions from each seed."""
    return [f"{method}, seed {seed}" for seed in range(num_seeds)]


def _by_seed(all_runs: PredictionEvaluation, sampled: list[str], num_seeds: int) -> dict[str, dict[str, list[float]]]:
    means = _means(all_runs)
    return {
        method: {measure: [means[run][measure] for run in _runs(method, num_seeds)] for measure in MEASURES}
        for method in sampled
    }


def _differences(evaluation: PredictionEvaluation) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        other.method: {
            of.measure: paired_difference(evaluation, MODEL, other.method, of.measure).to_dict()
            for of in other.measures
        }
        for other in evaluation.methods
        if other.method not in (MODEL, CEILING)
    }


def _predict_all(
    model: WorldModel, windows: list[HeldOutWindow], sampling: SamplingConfig, batch_size: int, num_seeds: int
) -> dict[str, list[np.ndarray]]:
    """Predicted videos by run for the WFM, by method for the others."""
    predictions: dict[str, list[np.ndarray]] = {}
    for method, actions in ((MODEL, _actions(windows)), (SHUFFLED, shuffled_actions(windows))):
        for seed, run in enumerate(_runs(method, num_seeds)):
            predictions[run] = _predict(model, windows, actions, _seeded(sampling, seed, windows), batch_size)
    predictions[REPEAT] = [repeat_last_frame(w.frames[:1], sampling.num_frames) for w in windows]
    predictions[CEILING] = model.tokenizer.use(lambda t: [reconstruct(t, w.frames) for w in windows])
    return predictions


def _actions(windows: list[HeldOutWindow]) -> list[np.ndarray]:
    return [window.actions for window in windows]  # type: ignore[misc]


def _seeded(sampling: SamplingConfig, run: int, windows: list[HeldOutWindow]) -> SamplingConfig:
    """No two windows of any two runs draw alike."""
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
    given = _actions(windows)
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
    """Those of some methods that were measured, in their order."""
    measured = {result.method: result for result in evaluation.methods}
    return dataclasses.replace(evaluation, methods=tuple(measured[name] for name in methods if name in measured))


def _show(output: Path, windows: list[HeldOutWindow], predictions: dict[str, list[np.ndarray]], fps: float) -> None:
    """Writes, for one window of each domain, a frame sheet and the videos."""
    import cv2

    for source in sorted({window.source for window in windows}):
        index = next(i for i, window in enumerate(windows) if window.source == source)
        runs = {method: _runs(method, 1)[0] if method in _SAMPLED else method for method in _METHODS}
        shown = {name: predictions[run][index] for name, run in runs.items() if run in predictions}
        rows = {"truth": windows[index].frames, **shown}
        sheet = frame_sheet(list(rows.values()), labels=list(rows), columns=6)
        cv2.imwrite(str(output / f"{source}.png"), sheet[..., ::-1])
        for name, video in rows.items():
            stem = name.replace(",", "").replace(" ", "_")
            write_video(output / f"{source}_{stem}.mp4", video, fps=fps)

"""What the quickstart says of each step, and what its report shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cosmos.contracts import Verdict
from nemo_cosmos.evaluation.report import MediaFile, TokenizerRow
from nemo_cosmos.evaluation.tokenizer_report import MEASURES_FILE
from nemo_cosmos.evaluation.video_prediction import PredictionEvaluation
from nemo_cosmos.files import read_json
from nemo_cosmos.quickstart.config import QuickstartConfig
from nemo_cosmos.steps.evaluate_wfm import MODEL, REPEAT, SHUFFLED, UNCONDITIONAL

if TYPE_CHECKING:
    from curator_stages.summary import CurationSummary
    from nemo_cosmos.contracts import GeneratedVideo, LatentCacheCard
    from nemo_cosmos.simulation.collect import CollectSummary

Measures = dict[str, float | str]


def of_collection(config: QuickstartConfig, result: CollectSummary) -> Measures:
    """Videos by source."""
    return {f"{source} videos": float(count) for source, count in result.videos.items()}


def of_curation(config: QuickstartConfig, result: CurationSummary) -> Measures:
    """Clips by decision."""
    rejected = {f"rejected by {stage}": float(count) for stage, count in result.rejected.items()}
    return {"videos": float(result.num_videos), "kept clips": float(result.num_kept), **rejected}


def of_tokenizer_training(config: QuickstartConfig, result: Path) -> Measures:
    """Loss at the end."""
    return _of_training(Path(result))


def of_tokenizer(config: QuickstartConfig, result: dict[str, Any]) -> Measures:
    """PSNR of the tokenizer and of plain coding."""
    return {f"{name} PSNR dB": values["psnr_db"] for name, values in result["methods"].items()}


def of_latents(config: QuickstartConfig, result: LatentCacheCard) -> Measures:
    """Samples by split."""
    return {f"{split} samples": float(count) for split, count in result.num_samples.items()}


def of_pretraining(config: QuickstartConfig, result: Path) -> Measures:
    """Loss at the end."""
    return _of_training(Path(result))


def of_finetuning(config: QuickstartConfig, result: Path) -> Measures:
    """Loss at the end."""
    return _of_training(Path(result))


def of_prediction(config: QuickstartConfig, result: dict[str, Any]) -> Measures:
    """PSNR of the WFM, of the same with shuffled actions, and of the baselines."""
    names = (MODEL, SHUFFLED, REPEAT, UNCONDITIONAL)
    return {f"{name}: PSNR dB": result[name]["PSNR"] for name in names}


def of_generation(config: QuickstartConfig, result: GeneratedVideo) -> Measures:
    """The guards' verdicts."""
    return {name: "safe" if verdict["safe"] else "unsafe" for name, verdict in result.guard.items()}


def for_report(config: QuickstartConfig) -> dict[str, Any]:
    """The parts of `QuickstartSummary` that stand in files."""
    output = config.output
    tokenizer = read_json(output / "tokenizer_evaluation" / MEASURES_FILE)
    record = read_json(output / "generated" / "video.json")
    prediction = PredictionEvaluation.from_dict(read_json(output / "evaluation" / "prediction.json"))
    actions = PredictionEvaluation.from_dict(read_json(output / "evaluation" / "actions.json"))
    sources = sorted(path.stem for path in (output / "evaluation").glob("*.png"))
    return {
        "tokenizer": tuple(
            TokenizerRow(method=name, num_stored=tokenizer["num_stored"], **values)
            for name, values in tokenizer["methods"].items()
        ),
        "loss_logs": tuple(
            MediaFile(path=f"{folder}/metrics.jsonl", caption=caption)
            for folder, caption in (
                ("tokenizer", "tokenizer"),
                ("pretrain", "pretraining"),
                ("finetune", "post-training"),
            )
        ),
        "prediction": prediction,
        "action_sensitivity": actions,
        "frame_sheets": tuple(
            MediaFile(
                path=f"evaluation/{source}.png", caption=f"{source}: a held-out rollout, predicted from its frame 0"
            )
            for source in sources
        ),
        "videos": (
            MediaFile(path="generated/video.mp4", caption=f"generated: {record['prompt']}"),
            *(
                MediaFile(path=str(path.relative_to(output)), caption=path.stem.replace("_", " "))
                for source in sources
                for path in sorted((output / "evaluation").glob(f"{source}_*.mp4"))
            ),
        ),
        "verdicts": tuple(Verdict.from_dict(verdict) for verdict in record["guard"].values()),
    }


def _of_training(run_folder: Path) -> Measures:
    """First and last smoothed loss of a run's log, and its speed."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    window = max(1, len(losses) // 5)
    return {
        "steps": float(len(rows)),
        "first loss": sum(losses[:window]) / window,
        "last loss": sum(losses[-window:]) / window,
    }

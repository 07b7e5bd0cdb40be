"""Aesthetic filter: the published score on CLIP embeddings; its weights are on the Hugging Face hub only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.clip_model import ClipModel
from curator_stages.config import CurationConfig
from curator_stages.faults import failing_alone
from curator_stages.gpu_shares import network_gpus, with_gpus
from curator_stages.tasks import ClipsTask
from nemo_cosmos.errors import UserError

if TYPE_CHECKING:
    from torch import nn

_MOST_SAMPLES = 4
_REVISION = "1e77fa0"
_WEIGHTS = "model.safetensors"


@dataclass
class AestheticStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Gives clips the score `aesthetic`, about 1 to 10, and rejects those below `aesthetic_min`.

    Source: the LAION aesthetic predictor (`sac+logos+ava1-l14-linearMSE`) on CLIP ViT-L/14, as NeMo-Curator and
    cosmos-curate use it.
    """

    config: CurationConfig
    name: str = "aesthetic_filter"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Asks for a share of a GPU where the network runs on one."""
        self.resources = with_gpus(self.resources, network_gpus(self.config.device))

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with samples."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same clips, scored."""
        return ["data", "span"], []

    def setup(self, worker_metadata: WorkerMetadata | None = None) -> None:
        """Loads CLIP and the head."""
        self._clip = ClipModel(self.config.clip_model, self.config.device)
        self._head = load_head(self.config.aesthetic_model).to(self.config.device)

    def process(self, task: ClipsTask) -> ClipsTask:
        """Scores the kept clips of one span, by the mean over some samples."""
        import torch

        limit = self.config.aesthetic_min
        for clip in task.kept():
            with failing_alone(clip, self.name):
                with torch.inference_mode():
                    score = float(self._head(self._clip.embed_pictures(clip.some_samples(_MOST_SAMPLES))).mean())
                clip.record = replace(clip.record, scores=clip.record.scores | {"aesthetic": score})
                if limit is not None and score < limit:
                    clip.reject(self.name, f"aesthetic {score:.2f} is below {limit:g}")
        return task


def load_head(model: str) -> nn.Module:
    """Loads the predictor's layers: CLIP embedding [N, 768] -> score [N, 1].

    Args:
        model: Folder with `model.safetensors`, or name on the Hugging Face hub.

    Raises:
        UserError: It cannot be had, or is another network.
    """
    from safetensors.torch import load_file
    from torch import nn

    sizes = (768, 1024, 128, 64, 16, 1)
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False)):
        # The published file counts the dropout layers that stand behind the first three.
        layers += [nn.Linear(before, after), *([nn.Identity()] if i < 3 else [])]
    head = nn.ModuleDict({"layers": nn.Sequential(*layers)})
    try:
        if Path(model).is_dir():
            weights = Path(model) / _WEIGHTS
        else:
            from huggingface_hub import hf_hub_download

            weights = Path(hf_hub_download(model, _WEIGHTS, revision=_REVISION))
        head.load_state_dict(load_file(weights))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"aesthetic_model: {model!r} cannot be loaded ({error}). Give a folder with {_WEIGHTS} or fetch it from "
            "the hub first; aesthetic_min null leaves the score out."
        ) from error
    return head["layers"].eval()

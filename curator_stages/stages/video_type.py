"""Video type: which kind of video a clip is, told apart by sentences (zero-shot CLIP)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.clip_model import ClipModel
from curator_stages.config import CurationConfig
from curator_stages.faults import failing_alone
from curator_stages.gpu_shares import network_gpus, with_gpus
from curator_stages.tasks import ClipsTask
from curator_stages.video_types import VIDEO_TYPES

_MOST_SAMPLES = 4


@dataclass
class VideoTypeStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Tags clips `type:<name>` of `VIDEO_TYPES`, scores `video_type_probability`, rejects the types not wanted.

    The technical report's own classifier, a network on InternVideo2 embeddings, has no published weights.
    """

    config: CurationConfig
    name: str = "video_type"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Asks for a share of a GPU where the network runs on one."""
        self.resources = with_gpus(self.resources, network_gpus(self.config.device))

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with samples."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same clips, tagged."""
        return ["data", "span"], []

    def setup(self, worker_metadata: WorkerMetadata | None = None) -> None:
        """Loads CLIP and embeds the sentences."""
        self._clip = ClipModel(self.config.clip_model, self.config.device)
        self._types = self._clip.embed_sentences(list(VIDEO_TYPES.values()))

    def process(self, task: ClipsTask) -> ClipsTask:
        """Classifies the kept clips of one span, by the mean over some samples."""
        for clip in task.kept():
            with failing_alone(clip, self.name):
                pictures = self._clip.embed_pictures(clip.some_samples(_MOST_SAMPLES))
                shares = (self._clip.temperature * pictures @ self._types.T).softmax(dim=-1).mean(dim=0)
                name, share = list(VIDEO_TYPES)[int(shares.argmax())], float(shares.max())
                record = clip.record
                clip.record = replace(
                    record,
                    scores=record.scores | {"video_type_probability": share},
                    tags=tuple(dict.fromkeys((*record.tags, f"type:{name}"))),
                )
                if name in self.config.video_types_rejected:
                    clip.reject(self.name, f"of type {name} (probability {share:.2f})")
        return task

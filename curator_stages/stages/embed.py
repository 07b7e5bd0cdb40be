"""Embed: one vector per clip that says what it shows."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.config import CurationConfig
from curator_stages.faults import failing_alone
from curator_stages.gpu_shares import network_gpus, with_gpus
from curator_stages.tasks import ClipsTask
from curator_stages.video_embedders import make_embedder


@dataclass
class EmbedStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Embeds clips by the network that `embedding_model` names."""

    config: CurationConfig
    name: str = "embed"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Asks for a share of a GPU where the network runs on one."""
        self.resources = with_gpus(self.resources, network_gpus(self.config.device))

    def inputs(self) -> tuple[list[str], list[str]]:
        """Clips with frames."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Clips with an embedding and, since this is the frames' last reader, without frames."""
        return ["data", "span"], []

    def setup(self, worker_metadata: WorkerMetadata | None = None) -> None:
        """Loads the network."""
        self._embedder = make_embedder(self.config)

    def process(self, task: ClipsTask) -> ClipsTask:
        """Embeds the kept clips of one span."""
        for clip in task.kept():
            with failing_alone(clip, self.name):
                clip.embedding = self._embedder.embed(clip.pixels)
        for clip in task.data:
            clip.drop_pictures()
        return task

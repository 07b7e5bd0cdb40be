"""Tokenizing as NeMo-Curator stages, so that any of its executors spreads curated shards over workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import EmptyTask, Task

from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.data.latent_cache import LatentCacheConfig
from nemo_cosmos.data.latent_writer import LatentWriter, captions_to_encode, unwritten_shards
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.text import load_text_encoder, text_encoder_fingerprint
from nemo_cosmos.tokenizer.streaming import StreamingEncoder


@dataclass
class CuratedShardTask(Task[str]):
    """The name of one curated shard."""

    @property
    def num_items(self) -> int:
        """One shard."""
        return 1

    def validate(self) -> bool:
        """Says whether there is a name."""
        return bool(self.data)

    def get_deterministic_id(self) -> str:
        """Returns the shard's name, by which tasks of an array job share the shards out."""
        return self.data


@dataclass
class ShardReaderStage(ProcessingStage[EmptyTask, CuratedShardTask]):
    """Lists the curated shards whose latents are not there yet.

    In a Slurm array job NeMo-Curator leaves each task of the array its share of them.
    """

    curated: str
    output: str
    name: str = "list_shards"
    resources: Resources = field(default_factory=lambda: Resources(cpus=0.1))

    def inputs(self) -> tuple[list[str], list[str]]:
        """Needs nothing of a task."""
        return [], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Gives shards' names."""
        return ["data"], []

    def process(self, _: EmptyTask) -> list[CuratedShardTask]:
        """Lists what is to do."""
        return [
            CuratedShardTask(dataset_name=self.curated, data=name)
            for name in unwritten_shards(self.curated, self.output)
        ]


@dataclass
class EncodeCaptionsStage(ProcessingStage[CuratedShardTask, CuratedShardTask]):
    """Encodes the captions of curated shards into the cache of text embeddings, as far as the shards lack them.

    One worker of a node loads the text encoder, which may be larger than all else; those that tokenize then find every
    caption there.
    """

    curated: str
    text_encoder: str
    config: LatentCacheConfig
    name: str = "encode_captions"
    resources: Resources = field(default_factory=Resources)

    def inputs(self) -> tuple[list[str], list[str]]:
        """Needs shards' names."""
        return ["data"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Gives the names on."""
        return ["data"], []

    def num_workers_per_node(self) -> float:
        """One, whatever else there is room for."""
        return 1

    def setup(self, _: WorkerMetadata | None = None) -> None:
        """Finds the text encoder, to run on the device that this worker was given."""
        self._encoder = load_text_encoder(self.text_encoder).to(current_device())
        self._fingerprint = text_encoder_fingerprint(self.text_encoder)

    def process(self, task: CuratedShardTask) -> CuratedShardTask:
        """Encodes the captions of one shard."""
        for caption in captions_to_encode(self.curated, task.data, self.config, self._fingerprint):
            self._encoder.encode([caption])  # one by one: the states of many would fill the memory
        return task


@dataclass
class TokenizeStage(ProcessingStage[CuratedShardTask, CuratedShardTask]):
    """Writes the latents of curated shards; each worker loads the tokenizer once."""

    curated: str
    output: str
    tokenizer: str
    text_encoder: str
    config: LatentCacheConfig
    progress: bool = False
    name: str = "tokenize"
    resources: Resources = field(default_factory=Resources)

    def inputs(self) -> tuple[list[str], list[str]]:
        """Needs shards' names."""
        return ["data"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Gives the names of what has been written."""
        return ["data"], []

    def setup(self, _: WorkerMetadata | None = None) -> None:
        """Loads the models on the device that this worker was given."""
        device = current_device()
        self._writer = LatentWriter(
            self.curated,
            self.output,
            tokenizer=StreamingEncoder(load_tokenizer(self.tokenizer).model.to(device)),
            text_encoder=load_text_encoder(self.text_encoder).to(device),
            config=self.config,
            text_fingerprint=text_encoder_fingerprint(self.text_encoder),
            progress=self.progress,
        )

    def process(self, task: CuratedShardTask) -> CuratedShardTask:
        """Writes one shard."""
        self._writer.write(task.data)
        return task

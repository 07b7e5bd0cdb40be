"""Text embed: the states of each caption's tokens, for tokenizing to find beside the clip."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from nemo_curator.backends.base import WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources

from curator_stages.faults import failing_alone
from curator_stages.gpu_shares import network_gpus, with_gpus
from curator_stages.tasks import ClipsTask
from curator_stages.threads import one_thread
from nemo_cosmos.text import (
    load_whole_text_encoder,
    pack_text_states,
    text_encoder_config,
    text_encoder_fingerprint,
)

if TYPE_CHECKING:
    import torch

_TEXTS_KEPT = 32
"""Captions whose states a worker holds in memory: T5's take up to 1 MB each, and views of a rollout share theirs."""


@dataclass
class TextEmbedStage(ProcessingStage[ClipsTask, ClipsTask]):
    """Embeds the captions of all windows by the encoder that the models to be trained take.

    A clip without captions gets none: no text is zeros there. Texts are encoded one by one, as in tokenizing, which
    then gives the same latent cache with and without this stage.
    """

    text_encoder: str
    """A name of `nemo_cosmos.text.TEXT_ENCODERS`, or a folder as `text_encoder_config` takes it."""
    device: str = "cpu"
    """Torch device."""
    name: str = "text_embed"
    resources: Resources = field(default_factory=Resources)
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Asks for a share of a GPU where the network runs on one."""
        self.resources = with_gpus(self.resources, network_gpus(self.device))

    def inputs(self) -> tuple[list[str], list[str]]:
        """Captioned clips."""
        return ["data", "span"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same clips with `text_states`."""
        return ["data", "span"], []

    def num_workers_per_node(self) -> int | None:
        """One where each would hold T5 in the host's memory, of which it takes 19 GB."""
        is_t5 = text_encoder_config(self.text_encoder).architecture == "t5"
        return 1 if is_t5 and self.device == "cpu" else None

    def setup(self, worker_metadata: WorkerMetadata | None = None) -> None:
        """Loads the encoder.

        Raises:
            UserError: There is no such encoder, or its weights are not there.
        """
        import torch

        self._fingerprint = text_encoder_fingerprint(self.text_encoder)
        self._encoder = load_whole_text_encoder(self.text_encoder, torch.device(self.device))
        self._states = lru_cache(maxsize=_TEXTS_KEPT)(self._encode)

    def process(self, task: ClipsTask) -> ClipsTask:
        """Embeds the captions of one span's kept clips."""
        for clip in task.kept():
            with failing_alone(clip, self.name):
                texts = {window.text for window in clip.record.captions if window.text}
                if texts:
                    clip.text_states = pack_text_states(self._fingerprint, {text: self._states(text) for text in texts})
        return task

    def _encode(self, text: str) -> torch.Tensor:
        with one_thread():
            return self._encoder.states(text)

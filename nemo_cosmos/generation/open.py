"""Putting a world model together from its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_cosmos.checkpoints.diffusion_decoder import StoredDiffusionDecoder, find_diffusion_decoder
from nemo_cosmos.checkpoints.embedded import find_checkpoint
from nemo_cosmos.checkpoints.load import AUTOREGRESSIVE, StoredNetwork, find_network, load_tokenizer
from nemo_cosmos.checkpoints.pipeline_folder import PipelineFolder, is_pipeline
from nemo_cosmos.diffusion.objective import EDM
from nemo_cosmos.errors import user_error
from nemo_cosmos.generation.autoregressive_world_model import AutoregressiveWorldModel
from nemo_cosmos.generation.diffusion_decoder import assemble_diffusion_decoder
from nemo_cosmos.generation.diffusion_world_model import DiffusionWorldModel
from nemo_cosmos.generation.layout import GenerationLayout
from nemo_cosmos.generation.loading import place_network, text_encoder_of
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.generation.stage import Stage
from nemo_cosmos.generation.world_model import WorldModel
from nemo_cosmos.parallel.branches import BranchRanks
from nemo_cosmos.parallel.device import current_device
from nemo_cosmos.parallel.startup import initialize, world_size
from nemo_cosmos.text import CachedTextEncoder, load_text_encoder
from nemo_cosmos.tokenizer.model import Tokenizer

_TOKENIZER, _DISCRETE_TOKENIZER = "tokenizer_tiny", "tokenizer_tiny_discrete"
"""Taken where none is named and the checkpoint has none of its own."""


@dataclass(frozen=True, kw_only=True)
class WorldModelSource(ABC):
    """Where the parts of a world model are; none of them is loaded."""

    network: StoredNetwork
    load_tokenizer: Callable[[], Tokenizer]
    load_text_encoder: Callable[[], CachedTextEncoder] | None
    """None where the network takes no text."""

    @property
    def takes_text(self) -> bool:
        """Whether a prompt means something to the network."""
        return self.load_text_encoder is not None

    @abstractmethod
    def complete(self, sampling: SamplingConfig | None) -> SamplingConfig:
        """Fills what is not set with the checkpoint's and the model's own values.

        Raises:
            UserError: Something is set that the model does not take.
        """

    def check_layout(self, layout: GenerationLayout) -> None:
        """Refuses a layout that does not fit the ranks or this family of models.

        Raises:
            UserError: Says what would.
        """
        layout.check(world_size())

    @abstractmethod
    def assemble(self, layout: GenerationLayout, *, offload: bool) -> WorldModel:
        """Makes the model of parts that load when they are used; the layout's process groups must be open."""

    def _parts(self, layout: GenerationLayout, *, offload: bool) -> dict[str, Any]:
        device, keep, load_text_encoder = current_device(), not offload, self.load_text_encoder
        return {
            "config": self.network.config(**layout.network),
            "network": Stage(lambda: place_network(self.network.load(**layout.network), layout), keep=keep),
            "tokenizer": Stage(lambda: self.load_tokenizer().to(device), keep=keep),
            "text_encoder": load_text_encoder and Stage(lambda: load_text_encoder().to(device), keep=keep),
            "card": self.network.card,
        }


@dataclass(frozen=True, kw_only=True)
class DiffusionSource(WorldModelSource):
    """Of a diffusion WFM."""

    edm: EDM = EDM()
    levels: dict[str, Any] = field(default_factory=dict)
    """Noise levels that the checkpoint names, as fields of `SamplingConfig`."""

    def complete(self, sampling: SamplingConfig | None) -> SamplingConfig:
        """See `WorldModelSource.complete`."""
        return (sampling or SamplingConfig()).for_diffusion(self.network.config(), self.levels)

    def assemble(self, layout: GenerationLayout, *, offload: bool) -> DiffusionWorldModel:
        """See `WorldModelSource.assemble`."""
        return DiffusionWorldModel(
            **self._parts(layout, offload=offload),
            edm=self.edm,
            levels=self.levels,
            branch_ranks=BranchRanks() if layout.split_guidance else None,
        )


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSource(WorldModelSource):
    """Of an autoregressive WFM."""

    diffusion_decoder: StoredDiffusionDecoder | None = None
    """Makes frames of tokens; None leaves that to the tokenizer."""
    continuous_tokenizer: str | Path = _TOKENIZER
    """Whose latents the diffusion decoder draws."""

    def complete(self, sampling: SamplingConfig | None) -> SamplingConfig:
        """See `WorldModelSource.complete`."""
        return (sampling or SamplingConfig()).for_autoregressive(self.network.config())

    def check_layout(self, layout: GenerationLayout) -> None:
        """Refuses all but tensor parallelism: a token at a time leaves other ranks nothing to do."""
        others = dataclasses.replace(layout, tensor=1)
        if others != GenerationLayout():
            told = {name: value for name, value in dataclasses.asdict(layout).items() if value > 1 or value is True}
            raise user_error(
                "layout",
                told,
                "tensor alone for an autoregressive WFM",
                "Use tensor-parallel ranks (--tensor-parallel).",
            )
        super().check_layout(layout)

    def assemble(self, layout: GenerationLayout, *, offload: bool) -> AutoregressiveWorldModel:
        """See `WorldModelSource.assemble`."""
        source = self.diffusion_decoder
        decoder = source and assemble_diffusion_decoder(source, self.continuous_tokenizer, layout, offload=offload)
        return AutoregressiveWorldModel(**self._parts(layout, offload=offload), diffusion_decoder=decoder)


def find_world_model(
    checkpoint: str | Path,
    tokenizer: str | Path | None = None,
    *,
    diffusion_decoder: str | Path | None = None,
    continuous_tokenizer: str | Path | None = None,
) -> WorldModelSource:
    """Finds the parts of a world model.

    Args:
        checkpoint: Anything `find_network` takes, or a diffusers pipeline folder, named likewise.
        tokenizer: Anything `load_tokenizer` takes; when absent a pipeline's own, else `tokenizer_tiny` for a diffusion
            WFM and `tokenizer_tiny_discrete` for an autoregressive one.
        diffusion_decoder: Anything `find_diffusion_decoder` takes: makes frames of an autoregressive WFM's tokens, in
            place of the tokenizer's own decoder.
        continuous_tokenizer: Whose latents the diffusion decoder draws: anything `load_tokenizer` takes;
            `tokenizer_tiny` when absent.

    Raises:
        UserError: Something is missing or of another kind, or a diffusion WFM is given a diffusion decoder.
    """
    if continuous_tokenizer is not None and diffusion_decoder is None:
        expected = "none, for no diffusion decoder draws its latents"
        raise user_error("continuous_tokenizer", str(continuous_tokenizer), expected, "Give a diffusion decoder too.")
    place = find_checkpoint(checkpoint)
    network = None if is_pipeline(place) else find_network(place)
    if network is None or network.kind is not AUTOREGRESSIVE:
        if diffusion_decoder is not None:
            expected = "none, for a diffusion WFM has no tokens to decode"
            raise user_error("diffusion_decoder", str(diffusion_decoder), expected, "Leave it out.")
        if network is None:
            return _of_pipeline(PipelineFolder(place), tokenizer)
        return DiffusionSource(**_parts_beside(network, tokenizer or _TOKENIZER))
    return AutoregressiveSource(
        **_parts_beside(network, tokenizer or _DISCRETE_TOKENIZER),
        diffusion_decoder=None if diffusion_decoder is None else find_diffusion_decoder(diffusion_decoder),
        continuous_tokenizer=continuous_tokenizer or _TOKENIZER,
    )


def _parts_beside(network: StoredNetwork, tokenizer: str | Path) -> dict[str, Any]:
    width = network.config().crossattn_emb_channels
    encoder = None if width is None else text_encoder_of(network.card, width)
    return {
        "network": network,
        "load_tokenizer": lambda: load_tokenizer(tokenizer).model,
        "load_text_encoder": None if encoder is None else lambda: load_text_encoder(encoder),
    }


def _of_pipeline(pipeline: PipelineFolder, tokenizer: str | Path | None) -> DiffusionSource:
    schedule = pipeline.schedule()
    return DiffusionSource(
        network=pipeline.network(),
        load_tokenizer=(lambda: load_tokenizer(tokenizer).model) if tokenizer else pipeline.tokenizer,
        load_text_encoder=pipeline.text_encoder,
        edm=EDM(sigma_data=schedule.sigma_data),
        levels={name: getattr(schedule, name) for name in ("sigma_max", "sigma_min", "final_sigma")},
    )


@contextlib.contextmanager
def open_world_model(
    checkpoint: str | Path | WorldModelSource,
    tokenizer: str | Path | None = None,
    *,
    layout: GenerationLayout | None = None,
    offload: bool = False,
) -> Iterator[WorldModel]:
    """Loads a WFM, its tokenizer and its text encoder onto this rank's device, for the time of the block.

    On a GPU the network runs in bf16, as it was trained; on the CPU in float32.

    Args:
        checkpoint: Anything `find_world_model` takes, or what it gave.
        tokenizer: Anything `find_world_model` takes; not read where it has been asked.
        layout: How the ranks share the work; on one rank when absent.
        offload: Have the weights of each part in memory only while it works; they are read anew for each use.

    Yields:
        The model; Megatron's process groups stay open until the block ends.

    Raises:
        UserError: Something is missing or does not fit together, or the layout does not fit the ranks or the model.
    """
    source = checkpoint if isinstance(checkpoint, WorldModelSource) else find_world_model(checkpoint, tokenizer)
    layout = layout or GenerationLayout()
    source.check_layout(layout)
    with initialize(**layout.groups):
        yield source.assemble(layout, offload=offload)

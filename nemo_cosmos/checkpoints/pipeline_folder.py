"""Folders of diffusers' `CosmosTextToWorldPipeline` and `CosmosVideoToWorldPipeline`, as `save_pretrained` writes them.

Everything that generation needs stands in one: the network (`transformer`), the tokenizer (`vae`), the text encoder
with its tokenizer, and the noise levels (`scheduler`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cosmos import __version__
from nemo_cosmos.checkpoints.load import DIFFUSION, StoredNetwork, load_tokenizer
from nemo_cosmos.checkpoints.wfm import TRANSFORMER, VAE, WEIGHTS_FILE
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.diffusion import state_dict as names
from nemo_cosmos.diffusion.architecture import architecture_of
from nemo_cosmos.diffusion.warm_start import copy_whole_weights
from nemo_cosmos.errors import user_error
from nemo_cosmos.files import read_json
from nemo_cosmos.text import CachedTextEncoder, load_text_encoder
from nemo_cosmos.tokenizer.conversion import fingerprint_of_diffusers
from nemo_cosmos.weight_files.safetensors_files import open_shards

if TYPE_CHECKING:
    from nemo_cosmos.diffusion.model import CosmosDiT
    from nemo_cosmos.tokenizer.model import Tokenizer

_INDEX = "model_index.json"
_PIPELINES = ("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline")


def is_pipeline(place: str | Path) -> bool:
    """Tells whether a folder holds a diffusers pipeline."""
    return (Path(place) / _INDEX).is_file()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What a pipeline's scheduler says of the noise levels."""

    sigma_data: float
    sigma_max: float
    sigma_min: float
    final_sigma: str


class PipelineFolder:
    """The parts of a pipeline, each read when it is asked for.

    Args:
        folder: What `save_pretrained` wrote.

    Raises:
        UserError: It holds another pipeline.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        pipeline = read_json(self.folder / _INDEX).get("_class_name")
        if pipeline not in _PIPELINES:
            raise user_error(f"{self.folder / _INDEX}", pipeline, f"one of {_PIPELINES}", "Give a Cosmos 1 pipeline.")

    def network(self) -> StoredNetwork:
        """The transformer, with a card made from what the folder tells.

        Raises:
            UserError: It is no Cosmos 1 model, or the tokenizer cannot be read.
        """
        config = names.config_from_diffusers(read_json(self.folder / TRANSFORMER / "config.json"))
        vae = read_json(self.folder / VAE / "config.json")
        card = CheckpointCard(
            model=self.folder.name,
            config=architecture_of(config),
            step=0,
            data="not known",
            command="diffusers",
            tokenizer_fingerprint=fingerprint_of_diffusers(self.folder / VAE),
            latent_mean=tuple(vae.get("latents_mean") or (0.0,) * config.in_channels),
            latent_std=tuple(vae.get("latents_std") or (1.0,) * config.in_channels),
            text_encoder=str(self.folder),
            versions={"nemo_cosmos": __version__},
        )

        def fill(network: CosmosDiT) -> None:
            weights = names.entering(open_shards(self.folder / TRANSFORMER, WEIGHTS_FILE), config, "diffusers")
            # diffusers has no uncertainty head, which generation has no use for.
            copy_whole_weights(
                network,
                weights,
                lambda name: weights[name].read(),
                source=str(self.folder),
                may_lack=names.NOT_IN_DIFFUSERS,
            )

        return StoredNetwork(kind=DIFFUSION, card=card, fill=fill)

    def tokenizer(self) -> Tokenizer:
        """The VAE, float32, on the CPU.

        Raises:
            UserError: It is no Cosmos tokenizer.
        """
        return load_tokenizer(self.folder / VAE).model

    def text_encoder(self) -> CachedTextEncoder:
        """T5 with the folder's own weights, on the CPU."""
        return load_text_encoder(self.folder)

    def schedule(self) -> Schedule:
        """The noise levels of the scheduler; absent fields have diffusers' defaults.

        Raises:
            UserError: It predicts or spaces its levels in another way than Cosmos 1.
        """
        path = self.folder / "scheduler" / "scheduler_config.json"
        values: dict[str, Any] = {
            "_class_name": "EDMEulerScheduler",
            "prediction_type": "epsilon",
            "sigma_schedule": "karras",
            "rho": 7.0,
        }
        told = read_json(path)
        other = {name: told[name] for name in values if told.get(name, values[name]) != values[name]}
        if other:
            raise user_error(str(path), other, f"{values}", "Give the scheduler that Cosmos 1 was published with.")
        return Schedule(
            sigma_data=told.get("sigma_data", 0.5),
            sigma_max=told.get("sigma_max", 80.0),
            sigma_min=told.get("sigma_min", 0.002),
            final_sigma=told.get("final_sigmas_type", "zero"),
        )

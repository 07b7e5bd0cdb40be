"""The latent cache through megatron-energon, for those who blend it with other data or keep energon's loaders.

    encoder = LatentTaskEncoder("runs/latents")
    data = get_train_dataset("runs/latents", task_encoder=encoder, batch_size=8, worker_config=..., ...)
    loader = get_savable_loader(data)

`nemo-cosmos train` reads the same shards by `nemo_cosmos.data.shuffle`, whose order no number of ranks or loader
processes changes. Needs megatron-energon, which nothing else imports.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from megatron.energon import Cooker, DefaultTaskEncoder, Sample, SkipSample, basic_sample_keys, edataclass, stateless

from nemo_cosmos.contracts import LatentSample
from nemo_cosmos.data.latent_cache import LatentDecoder
from nemo_cosmos.tokenizer.statistics import Numbers


@edataclass
class CookedLatent(Sample):
    """One sample; with a first axis more also a batch of them."""

    text_emb: torch.Tensor
    """float32 [L, D]."""
    text_mask: torch.Tensor
    """bool [L]."""
    fps: torch.Tensor
    """float32 scalar."""
    latent: torch.Tensor | None = None
    """float32 [C, T, H, W], normalised, of a continuous tokenizer."""
    tokens: torch.Tensor | None = None
    """int32 [T, H, W], of a discrete one."""
    actions: torch.Tensor | None = None
    """float32 [num_frames-1, ACTION_DIM], where asked for."""


class LatentTaskEncoder(DefaultTaskEncoder):
    """Makes batches of a latent cache's samples, the same as those that `LatentDataset` gives.

    Args:
        root: The cache's folder.
        sources: Only these domains; None for all.
        with_actions: Only samples that carry actions, and give them.
        statistics: Mean and standard deviation to normalise by; the cache's own when absent.

    Raises:
        UserError: As for `LatentDecoder`.
    """

    decoder = None  # members come as bytes

    def __init__(
        self,
        root: str | Path,
        *,
        sources: tuple[str, ...] | None = None,
        with_actions: bool = False,
        statistics: tuple[Numbers, Numbers] | None = None,
    ) -> None:
        super().__init__()
        self._decoder = LatentDecoder(root, sources=sources, with_actions=with_actions, statistics=statistics)
        self.cookers = [Cooker(self.cook)]

    @stateless
    def cook(self, members: dict) -> CookedLatent:
        """Decodes one sample's members.

        Raises:
            SkipSample: The sample is not wanted.
        """
        sample = LatentSample.from_dict(json.loads(members["json"]))
        if not self._decoder.takes(sample):
            raise SkipSample
        return CookedLatent(**basic_sample_keys(members), **self._decoder.decode(sample, members["safetensors"]))

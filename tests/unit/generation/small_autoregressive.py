"""A small autoregressive WFM with every condition, and a small discrete tokenizer, in memory and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_cosmos.autoregressive.architecture import architecture_of
from nemo_cosmos.autoregressive.config import ARConfig
from nemo_cosmos.autoregressive.model import CosmosAR
from nemo_cosmos.checkpoints.weight_file import write_file
from nemo_cosmos.contracts import CheckpointCard
from nemo_cosmos.tokenizer import weights
from nemo_cosmos.tokenizer.config import TokenizerConfig
from nemo_cosmos.tokenizer.model import CausalVideoTokenizer
from nemo_cosmos.weight_files.stored_tensor import stored

WITH_TEXT = {"special_tokens": True, "extra_pos_embed": "sincos", "crossattn_emb_channels": 384}
WITH_ACTIONS = {**WITH_TEXT, "action_dim": 7, "num_medusa_heads": 2}


def small_tokenizer() -> CausalVideoTokenizer:
    """Of 64 codes."""
    torch.manual_seed(0)
    config = TokenizerConfig(channels=8, num_res_blocks=1, levels=(4, 4, 4), latent_channels=3, z_channels=8)
    return CausalVideoTokenizer(config).eval()


def small_config(**fields: Any) -> ARConfig:
    sizes = {
        "num_layers": 2,
        "hidden_size": 72,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 18,
        "ffn_hidden_size": 40,
        "vocab_size": 64,
        "backend": "torch",
    }
    return ARConfig(**{**sizes, **fields})


def small_network(**fields: Any) -> CosmosAR:
    """Every condition matters: no two weights are alike, and none is small. Megatron's groups must be open."""
    network = CosmosAR(small_config(**fields)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise / parameter.shape[1] ** 0.5)
    return network


def card_of(network: CosmosAR, tokenizer: CausalVideoTokenizer) -> CheckpointCard:
    return CheckpointCard(
        model="small",
        config=architecture_of(network.config),
        step=0,
        data="none",
        command="none",
        tokenizer_fingerprint=tokenizer.fingerprint(),
    )


def write_small(folder: Path, **fields: Any) -> tuple[Path, Path]:
    """Writes checkpoint and tokenizer; Megatron's groups must be open. Returns their paths."""
    network, tokenizer = small_network(**fields), small_tokenizer()
    checkpoint = folder / "small.safetensors"
    write_file(stored(dict(network.global_tensors())), card_of(network, tokenizer), checkpoint)
    weights.save(tokenizer, folder / "tokenizer")
    return checkpoint, folder / "tokenizer"

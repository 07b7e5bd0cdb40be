"""Which implementation of linear layers, norms and core attention a model is built from."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any, Literal, Protocol

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_cosmos.errors import user_error
from nemo_cosmos.parallel.attention import SDPACoreAttention
from nemo_cosmos.parallel.linear import ColumnLinear, RowLinear
from nemo_cosmos.parallel.norms import RMSNorm

BackendName = Literal["auto", "torch", "te"]


class Backend(Protocol):
    """The types that a layer spec is filled with; all take Megatron's constructor arguments."""

    name: str
    column_linear: type[torch.nn.Module]
    row_linear: type[torch.nn.Module]
    rms_norm: type[torch.nn.Module]
    core_attention: type[torch.nn.Module]


class TorchBackend:
    """Megatron's own parallel linear layers, this package's norm and torch's attention. Runs on any device."""

    name: str = "torch"
    column_linear: type[torch.nn.Module] = ColumnLinear
    row_linear: type[torch.nn.Module] = RowLinear
    rms_norm: type[torch.nn.Module] = RMSNorm
    core_attention: type[torch.nn.Module] = SDPACoreAttention


class TEBackend:
    """TransformerEngine's layers, imported when the object is made.

    Raises:
        UserError: TransformerEngine is not installed.
    """

    name: str = "te"

    def __init__(self) -> None:
        try:
            import transformer_engine.pytorch  # noqa: F401 - Megatron's extension hides why the import failed
            from megatron.core.extensions import transformer_engine as te
        except ImportError as error:
            raise user_error(
                "backend",
                "te",
                f"TransformerEngine to be installed ({error})",
                "Run in an NGC NeMo container, or choose backend 'torch'.",
            ) from error
        self.column_linear = te.TEColumnParallelLinear
        self.row_linear = te.TERowParallelLinear
        self.rms_norm = te.TENorm
        self.core_attention = te_core_attention(te.TEDotProductAttention)


def te_core_attention(te_attention: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Adapts TE's attention to this project's token layout.

    The text of cross-attention is on every rank, so nothing is exchanged there. Self-attention exchanges heads where
    they divide, else passes keys around. TE takes the tokens to be split in a zigzag; without a causal mask their order
    is of no account, as the rotary angles are applied before. `share_tokens` is that of `SDPACoreAttention`.

    Args:
        te_attention: `megatron.core.extensions.transformer_engine.TEDotProductAttention`.

    Returns:
        A class with the constructor of Megatron's core attention.
    """

    class TECoreAttention(te_attention):  # type: ignore[valid-type,misc]
        def __init__(
            self,
            config: TransformerConfig,
            layer_number: int,
            attn_mask_type: AttnMaskType,
            attention_type: str,
            cp_comm_type: str | None = None,
            **kwargs: Any,  # noqa: ANN401 - the rest of Megatron's signature
        ) -> None:
            if attention_type == "cross":
                config = copy.copy(config)
                config.context_parallel_size = 1
            if cp_comm_type is None:
                key_heads = config.num_query_groups // config.tensor_model_parallel_size
                cp_comm_type = "p2p" if key_heads % config.context_parallel_size else "a2a"
            super().__init__(config, layer_number, attn_mask_type, attention_type, cp_comm_type=cp_comm_type, **kwargs)
            self._sharing = (self.cp_group, self.cp_global_ranks, self.cp_stream, cp_comm_type)

        def share_tokens(self, shared: bool) -> None:
            self.set_context_parallel_group(*(self._sharing if shared else (None, None, None, self._sharing[-1])))

    return TECoreAttention


def get_backend(name: BackendName = "auto") -> Backend:
    """Returns the backend of that name.

    Args:
        name: `torch`, `te`, or `auto`: TransformerEngine where it is installed and there is a CUDA device, else torch.

    Raises:
        UserError: The name is unknown, or TransformerEngine is wanted and missing.
    """
    if name not in ("auto", "torch", "te"):
        raise user_error("backend", name, "'auto', 'torch' or 'te'", "Choose one of these.")
    if name == "auto":
        has_te = importlib.util.find_spec("transformer_engine") is not None
        name = "te" if torch.cuda.is_available() and has_te else "torch"
    return TEBackend() if name == "te" else TorchBackend()

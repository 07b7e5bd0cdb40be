"""Text embeddings beside a clip in a curated shard, so that tokenizing need not encode its captions again."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nemo_cosmos.errors import UserError
from nemo_cosmos.text.cache import hash_of

if TYPE_CHECKING:
    import torch

_FINGERPRINT = "text_encoder_fingerprint"


def pack_text_states(fingerprint: str, states: Mapping[str, torch.Tensor]) -> bytes:
    """Lays token states out as a safetensors file.

    A text is known by its hash, never by position: whatever becomes of a clip's captions, states cannot land on
    another text.

    Args:
        fingerprint: The encoder's, as of `text_encoder_fingerprint`; stands in the file's header.
        states: By text, [tokens, D] without padding.

    Returns:
        The file; it holds bf16, as a latent cache does.
    """
    import torch
    from safetensors.torch import save

    tensors = {hash_of(text): found.to(torch.bfloat16).contiguous() for text, found in sorted(states.items())}
    return save(tensors, {_FINGERPRINT: fingerprint})


def unpack_text_states(data: bytes, fingerprint: str, *, name: str) -> dict[str, torch.Tensor]:
    """Reads what `pack_text_states` wrote.

    Args:
        data: The file.
        fingerprint: Of the encoder whose states are wanted.
        name: What to call the file in an error.

    Returns:
        By `hash_of(text)`, bf16 [tokens, D]; empty when another encoder made them.

    Raises:
        UserError: The file is broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        (length,) = struct.unpack_from("<Q", data)
        made_by = json.loads(data[8 : 8 + length])["__metadata__"][_FINGERPRINT]
        return load(data) if made_by == fingerprint else {}
    except (SafetensorError, KeyError, ValueError, struct.error) as error:
        raise UserError(
            f"{name}: no whole text embeddings ({error}). Delete the shard and run nemo-cosmos curate again."
        ) from error

"""Text embeddings on disk, shared by all runs of a user: generation and tokenizing encode each text once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_cosmos.errors import UserError
from nemo_cosmos.files import written_aside

if TYPE_CHECKING:
    import torch

FOLDER_VARIABLE = "NEMO_COSMOS_CACHE"
"""Environment variable that names another folder than `~/.cache/nemo_cosmos`."""


class EmbeddingCache:
    """The embeddings of one encoder; a file for each text, of which only the hash is stored.

    The folder may be deleted at any time. It may be shared between nodes.

    Args:
        encoder: What tells the encoder from all others.
        dtype: What it computes in; holds its states exactly.
    """

    def __init__(self, encoder: str, *, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._key = hash_of(f"{encoder}, {dtype}")[:32]
        root = Path(os.environ.get(FOLDER_VARIABLE, "~/.cache/nemo_cosmos")).expanduser()
        self._folder = root / "text" / self._key

    def read(self, text: str) -> torch.Tensor | None:
        """Finds the states of a text's tokens, float32 [tokens, D]; None where it has not been encoded.

        Raises:
            UserError: The file is broken.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(text)
        try:
            return load_file(path)["states"].float()
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError) as error:
            raise UserError(f"{path}: no whole text embedding ({error}). Delete it, and run again.") from error

    def write(self, text: str, states: torch.Tensor) -> None:
        """Keeps the states of a text's tokens.

        Args:
            text: The text.
            states: [tokens, D], without padding.

        Raises:
            UserError: The folder cannot be written.
        """
        from safetensors.torch import save_file

        with written_aside(self._path(text)) as aside:
            save_file({"states": states.to(self._dtype).contiguous()}, aside)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lets one process of this node in at a time, for the time of the block."""
        from filelock import FileLock

        # In a folder of this node, not in the cache's: network file systems do not always lock.
        with FileLock(Path(tempfile.gettempdir()) / f"nemo_cosmos_{os.getuid()}_{self._key}.lock"):
            yield

    def _path(self, text: str) -> Path:
        return self._folder / f"{hash_of(text)}.safetensors"


def hash_of(text: str) -> str:
    """Returns the name that stored states of a text go by: its SHA-256 in hex."""
    return hashlib.sha256(text.encode()).hexdigest()

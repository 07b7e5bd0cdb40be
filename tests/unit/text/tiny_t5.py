"""A T5 encoder of random weights with a tokenizer, in the folders of a diffusers pipeline."""

from __future__ import annotations

import string
from pathlib import Path

import torch


def write_tiny_t5(folder: Path, *, seed: int = 0) -> Path:
    """Writes `text_encoder` (width 16) and `tokenizer` (one token a letter) into a folder and returns it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    T5TokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    config = T5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder

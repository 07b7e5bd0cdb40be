"""A text encoder that needs no weights."""

import torch


class WordEncoder:
    """Encodes a text by the length of its words, and its end; an empty one is no text."""

    def encode(self, prompts):
        states = torch.zeros(len(prompts), 8, 384)
        for i, prompt in enumerate(prompts):
            for j, word in enumerate([*prompt.split()[:7], "."] if prompt else []):
                states[i, j] = len(word)
        return states, states[..., 0] > 0

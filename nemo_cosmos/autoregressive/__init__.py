"""The autoregressive world foundation model: a transformer that predicts the next token of a discrete video."""

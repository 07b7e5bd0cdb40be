"""Video tokenizers: architecture, weights, training step."""

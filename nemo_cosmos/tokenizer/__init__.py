"""Video and image tokenizers: architecture, weights, training step."""

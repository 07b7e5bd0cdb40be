"""The diffusion world foundation model: the Cosmos DiT, its objective and its samplers."""

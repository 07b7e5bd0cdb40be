"""The diffusion decoder: a DiT that makes continuous latents of discrete tokens.

A discrete tokenizer throws away what its codes cannot hold, and its own decoder fills the gap with a mean. Here the
Cosmos DiT draws latents of the continuous tokenizer that agree with the tokens, and that tokenizer's decoder makes
pixels of them. It is a diffusion model, and so the one part of `autoregressive` that imports `diffusion`.

Source: Cosmos report (arXiv 2501.03575), section 5.2.3; `autoregressive/diffusion_decoder` of NVIDIA cosmos-predict1.
"""

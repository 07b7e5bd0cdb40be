"""Generating video with a diffusion WFM."""

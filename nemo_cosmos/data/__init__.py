"""Reading curated clips, writing and reading the latent cache, and the data modules of the training recipes."""

"""NeMo-Curator stages, one per file, in the order of the pipeline."""

"""NeMo-Curator stages and the pipeline that turn a folder of videos into a curated set of clips."""

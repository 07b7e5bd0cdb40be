"""Finding out what a checkpoint is, loading it for inference, and converting between formats."""

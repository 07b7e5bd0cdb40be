"""What the transformers of both world models are made of."""

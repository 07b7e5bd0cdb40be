"""The `nemo-cosmos` command line."""

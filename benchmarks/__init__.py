"""Scripts that print how fast a part is beside a named peer, measured in the same process."""

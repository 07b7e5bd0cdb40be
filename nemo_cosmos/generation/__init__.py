"""Generating video with a WFM of either family."""

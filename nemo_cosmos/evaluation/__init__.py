"""Measures of video quality, baselines to stand beside them, and the reports that show both."""

"""Deduplication of clips: identical ones, ones that look the same, and ones whose embeddings are near."""

"""The whole road at small size: one command from real video to a generated, guarded, measured video."""

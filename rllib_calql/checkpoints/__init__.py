"""Checkpoints: folders, checksums, manifest, saving and restoring."""

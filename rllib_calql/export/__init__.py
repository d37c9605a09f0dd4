"""Checkpoints to files of their policies."""

"""Readers of offline data, one file per format."""

"""Data sets that this package makes itself."""

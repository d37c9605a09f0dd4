"""What concerns the operating system: locks, names of files, signals."""

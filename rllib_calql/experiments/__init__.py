"""Experiment files and the Ray Tune runs made of them."""

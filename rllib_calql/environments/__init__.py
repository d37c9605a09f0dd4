"""Environments: what a name of one stands for, in every process."""

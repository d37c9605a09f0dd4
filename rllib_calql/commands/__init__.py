"""The `rllib` command, one file per sub-command."""

"""Fitted Q evaluation: what a policy is worth, by recorded data alone."""

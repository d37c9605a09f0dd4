"""How an experiment file searches: spaces of settings, schedulers, and search algorithms."""

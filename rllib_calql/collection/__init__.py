"""Whole episodes from env runners: requests, connectors, callbacks."""

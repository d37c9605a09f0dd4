"""Offline data: readers, one per format and all of them sources of whole episodes, and what writes such data.

The names below are public; the folders beside this file are where they live.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rllib_calql.common.held_data import InMemoryDataset, InMemoryEpisodes
    from rllib_calql.datasets.episodes.reader import DatasetInfo, EpisodeReader, ReadOptions
    from rllib_calql.datasets.generated.catalog import ensure_dataset, generate, generated_dataset_ids
    from rllib_calql.datasets.readers.opening import open_input
    from rllib_calql.datasets.writers.conversion import convert
    from rllib_calql.datasets.writers.recording import record

__all__ = [
    "DatasetInfo",
    "EpisodeReader",
    "InMemoryDataset",
    "InMemoryEpisodes",
    "ReadOptions",
    "convert",
    "ensure_dataset",
    "generate",
    "generated_dataset_ids",
    "open_input",
    "record",
]

# Loaded on first use: some bring algorithms and environments along, and what needs one folder need not load the others.
_MODULES_OF_NAMES = {
    "DatasetInfo": "rllib_calql.datasets.episodes.reader",
    "EpisodeReader": "rllib_calql.datasets.episodes.reader",
    "InMemoryDataset": "rllib_calql.common.held_data",
    "InMemoryEpisodes": "rllib_calql.common.held_data",
    "ReadOptions": "rllib_calql.datasets.episodes.reader",
    "convert": "rllib_calql.datasets.writers.conversion",
    "ensure_dataset": "rllib_calql.datasets.generated.catalog",
    "generate": "rllib_calql.datasets.generated.catalog",
    "generated_dataset_ids": "rllib_calql.datasets.generated.catalog",
    "open_input": "rllib_calql.datasets.readers.opening",
    "record": "rllib_calql.datasets.writers.recording",
}


def __getattr__(name: str) -> Any:
    """Loads what `__all__` names on first use (PEP 562)."""
    if name not in _MODULES_OF_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES_OF_NAMES[name]), name)


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted(__all__)

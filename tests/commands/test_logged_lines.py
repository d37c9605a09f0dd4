"""What is logged while a command runs."""

from __future__ import annotations

import logging

import pytest

from rllib_calql.commands.setup import prepare


def test_what_is_logged_is_said_without_the_names_of_modules(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    level = logging.root.level
    try:
        prepare(verbose=False)
        logging.getLogger("rllib_calql.store").warning("%d steps dropped", 6)
        logging.getLogger("some_library").error("no disk")
        logging.getLogger("some_library").info("a detail")
    finally:
        logging.root.setLevel(level)
    assert capsys.readouterr().err == "Warning: 6 steps dropped\nError: no disk\n"

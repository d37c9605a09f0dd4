"""The words of `reference_value` and of the settings that go with it. Any other word is a column of the data."""

from __future__ import annotations

RETURNS_TO_GO = "returns_to_go"
LEARNED = "learned"
QUANTILE = "quantile"
NONE = "none"

REFERENCE_VALUES = (RETURNS_TO_GO, LEARNED, QUANTILE)
REFERENCES_ONLINE = (RETURNS_TO_GO, LEARNED, NONE)

MONTE_CARLO = "monte_carlo"
TD = "td"
REFERENCE_FITS = (MONTE_CARLO, TD)

MAXIMUM = "maximum"
PENALTY = "penalty"
CALIBRATION_FORMS = (MAXIMUM, PENALTY)

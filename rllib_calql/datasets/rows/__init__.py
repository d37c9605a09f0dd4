"""From rows in columns, NumPy's or Arrow's, to whole episodes."""

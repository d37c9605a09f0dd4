"""Studies: algorithms compared on tasks over seeds, and what a report says about them."""

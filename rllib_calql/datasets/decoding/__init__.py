"""Reading packed data without running them."""

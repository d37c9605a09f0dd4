"""A trained policy as a file, and what runs it with NumPy alone."""

"""What data hold: collected, said, drawn."""

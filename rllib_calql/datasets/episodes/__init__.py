"""What a whole episode is, and what all readers share."""

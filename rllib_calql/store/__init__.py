"""Where transitions live: the offline table, the online ring, and how data get there."""

"""Writers of offline data, recording and conversion."""

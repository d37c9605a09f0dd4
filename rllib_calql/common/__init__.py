"""What several wings share: keys of metrics, returns, spaces, data that are held in memory."""

"""Feature cache: features of frozen encoders, kept on disk by content."""

"""One file a modality: how its items are read, measured and encoded."""

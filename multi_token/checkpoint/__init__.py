"""The checkpoint folder: trained tensors, and references to the rest."""

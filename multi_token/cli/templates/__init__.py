"""Templates of `multi-token modalities new`: a package with one modality, to be filled in."""

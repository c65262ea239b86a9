"""What `multi-token modalities new` writes: a package of one sense, to be filled in."""

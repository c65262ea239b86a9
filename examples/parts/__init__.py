"""Parts that the examples share: speech, games, drawn galleries, documents of facts, pages."""

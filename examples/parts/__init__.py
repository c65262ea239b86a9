"""Parts that the examples share: speech, games, drawn galleries, documents of facts, pages."""

INSTALL_EXAMPLES = 'pip install "multi_token[examples]"'

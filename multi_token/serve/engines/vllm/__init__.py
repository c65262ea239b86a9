"""vLLM servers as engine: prompts over HTTP, verified by a golden request."""

"""The gateway to vLLM servers."""

"""The local engine: continuous batching over a left-padded KV cache."""

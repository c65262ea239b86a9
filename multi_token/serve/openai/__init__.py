"""OpenAI-compatible HTTP API: request schema, messages, responses and middleware."""

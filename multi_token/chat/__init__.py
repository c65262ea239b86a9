"""Conversation <-> token ids, over the language model's own chat template."""

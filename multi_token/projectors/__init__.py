"""Projectors: encoder features -> the language model's width."""

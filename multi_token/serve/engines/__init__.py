"""Engines: prompt -> tokens."""

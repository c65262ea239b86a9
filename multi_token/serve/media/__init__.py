"""Untrusted media: decoded in worker processes, under limits."""

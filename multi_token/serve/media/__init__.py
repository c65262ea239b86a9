"""Untrusted media: decoded in sandboxed worker processes, under limits of size, memory and time.

The modalities decode; this folder adds processes and limits, and never opens a path of a request.
"""

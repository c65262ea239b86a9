"""`multi-token demo`: models and images from packages, rows, training, scores and the report.

Imported by `cli/demo.py`, the examples and benchmarks only; the library never imports it.
"""

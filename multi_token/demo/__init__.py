"""The demo's own parts: models and pictures from packages, rows, scores and the report.

Border: nothing here is imported by the library; the demo uses the library, never the reverse.
"""

"""Storage formats of rows, one file each; `open.py` picks the format by the name of the source.

Rows come out as mappings. No file here decodes media or knows a modality.
"""

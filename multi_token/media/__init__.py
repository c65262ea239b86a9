"""Sources -> decoded items: fetch.py reads bytes, and each other file decodes one kind."""

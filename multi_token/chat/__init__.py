"""Conversations and token ids, over the language model's own chat template.

`format.py` -> `template.py` -> `alignment.py`. The folder gets the number of media embeddings of
each item; encoders, projectors and the language model itself are elsewhere.
"""

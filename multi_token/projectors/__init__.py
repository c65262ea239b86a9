"""Projectors: encoder features become media embeddings of the language model's width.

A projector sees features and their mask, no modalities, ids or positions. `base.py` has the
contract and the common steps, `kinds.py` and `resampler.py` the kinds. Each kind alone decides
its number of media embeddings per item.
"""

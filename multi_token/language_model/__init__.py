"""The language model: loading, adapters, capabilities, forward. The only home of its quirks.

The model stays an untouched child: nothing here subclasses or patches it. `loading.py` makes it,
`probe.py` finds its `capabilities.py`, `forward.py` runs it from embeddings, `loss.py` trains
through it. No list of model names: a quirk is found by its effect or by a field of the
configuration.
"""

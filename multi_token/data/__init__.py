"""Rows of files and hubs -> conversations -> samples, and checks of both before training.

    files/ -> rows -> formats.py -> Conversation -> processor -> Sample -> dataset.py | streaming.py

No file here loads a language model or an encoder; media are opened by the processor alone.
"""

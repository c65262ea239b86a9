"""Rows of files and hubs -> conversations -> samples, and checks of both before training.

    files/ -> rows -> formats.py -> Conversation -> processor -> Sample -> dataset.py | streaming.py

No file here loads a language model or an encoder; media are opened by the processor alone.
"""

from multi_token.data.dataset import ConversationDataset, row_to_sample
from multi_token.data.files.jsonl import write_jsonl
from multi_token.data.files.open import load_rows, media_root
from multi_token.data.formats import to_conversation
from multi_token.data.rows import row_id_of
from multi_token.data.scan import ScanReport, histogram, scan
from multi_token.data.show import render_sample

__all__ = [
    "ConversationDataset",
    "ScanReport",
    "histogram",
    "load_rows",
    "media_root",
    "render_sample",
    "row_id_of",
    "row_to_sample",
    "scan",
    "to_conversation",
    "write_jsonl",
]

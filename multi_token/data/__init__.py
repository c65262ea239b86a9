"""Files of rows in, conversations and samples out; and the look at them before a GPU is rented.

Border: rows and their shapes. Media are opened by the reader, weights by nobody here.
"""

from multi_token.data.dataset import ConversationDataset, row_to_sample
from multi_token.data.files.open import load_rows, media_root
from multi_token.data.formats import to_conversation
from multi_token.data.rows import row_id_of
from multi_token.data.scan import ScanReport, histogram, render_sample, scan, write_clean

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
    "write_clean",
]

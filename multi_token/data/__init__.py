"""Files of rows in, conversations and samples out; and the look at them before a GPU is rented.

Border: rows and their shapes. Media are opened by the reader, weights by nobody here.
"""

from multi_token.data.dataset import ConversationDataset, load_rows, read_row, row_name, rows_root
from multi_token.data.formats import to_conversation
from multi_token.data.scan import Report, histogram, render_sample, scan, write_clean

__all__ = [
    "ConversationDataset",
    "Report",
    "histogram",
    "load_rows",
    "read_row",
    "render_sample",
    "row_name",
    "rows_root",
    "scan",
    "to_conversation",
    "write_clean",
]

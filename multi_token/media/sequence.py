"""Letters of proteins, DNA and molecules: records of FASTA files, or a MediaError."""

from __future__ import annotations

from multi_token.media.errors import undecodable
from multi_token.media.sniff import describe
from multi_token.registry import did_you_mean


def read_letters(data: bytes, label: str, *, record: str | None = None) -> str:
    """Return the letters of a record in a FASTA file, or of a plain text.

    Args:
        data: The file; FASTA if its first character is `>`.
        label: Opens error messages.
        record: The first word of the record's header; None for the first record.

    Raises:
        MediaError: The file is no text, or has no such record.
    """
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError
    except ValueError:
        raise undecodable(f"{label} is not a text: {describe(data)}; expected FASTA") from None
    if not text.lstrip().startswith(">"):
        if record is not None:
            raise undecodable(f"{label} is no FASTA file, so it has no record {record!r}")
        return text
    names: list[str] = []
    for entry in text.lstrip()[1:].split("\n>"):
        head, _, body = entry.partition("\n")
        names.append(head.split()[0] if head.split() else "")
        if record is None or names[-1] == record:
            return body
    raise undecodable(
        f"{label} has no record {record!r}{did_you_mean(record or '', names)} "
        f"({len(names):,} records)"
    )

"""convert/original_builders.py: the table in the document is the code's."""

from __future__ import annotations

from pathlib import Path

from multi_token.convert.original_builders import BUILDERS
from multi_token.registry import resolve

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "import-export.md"
MARK = "<!-- builders -->"


def table() -> str:
    rows = [
        "| builder | slot | rows | encoder | features | width | projector | tokens | here |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, b in BUILDERS.items():
        here = f"`{b.modality_type}`" + ("" if b.fields is not None else ", refused")
        cells = [f"`{name}`", f"`<{b.name}>`", f"`{b.rows_key}`", f"`{b.encoder}`", b.features]
        cells += [str(b.in_dim), f"`{b.projector}`", str(b.num_tokens), here]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_table_in_the_document_is_the_code_s() -> None:
    _, found, _ = DOCUMENT.read_text(encoding="utf-8").split(MARK)
    assert found.strip() == table()


def test_each_builder_that_is_here_has_fields_that_its_modality_takes() -> None:
    for builder in BUILDERS.values():
        if builder.fields is None:
            continue
        cls = resolve("modality", builder.modality_type)
        modality = cls(
            encoder=builder.encoder, projector=builder.projector_fields, **builder.fields
        )
        assert not modality.projector.standardize
        num_features = builder.num_tokens if builder.projector == "mlp" else 1
        assert modality.num_tokens(num_features) == builder.num_tokens

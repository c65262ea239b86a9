"""report/chart.py: any finite curve can be drawn, on round numbers."""

from __future__ import annotations

import re

import pytest

from multi_token.report.chart import chart


def ticks(drawn: str) -> list[str]:
    return re.findall(r'text-anchor="end">([^<]*)<', drawn)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.0, 0.0], ["0", "0.25", "0.5", "0.75", "1"]),
        ([3.0], ["0", "1", "2", "3"]),
        ([1e-3, 5e-4], ["0", "0.00025", "0.0005", "0.00075", "0.001"]),
        ([-0.5, 2.0], ["-1", "0", "1", "2"]),
        ([41_000.0], ["0", "2e+04", "4e+04", "6e+04"]),
    ],
)
def test_a_plain_axis_has_round_numbers_around_all_values(
    values: list[float], shown: list[str]
) -> None:
    drawn = chart(list(enumerate(values, 1)), label="x", log=False, share=False)
    assert ticks(drawn) == shown
    heights = [float(y) for y in re.findall(r"[\d.]+,([\d.]+)", drawn)]
    assert heights and all(8 <= y <= 216 for y in heights)


def test_what_is_no_number_is_left_out() -> None:
    points = [(1, float("nan")), (2, 1.0), (3, float("inf"))]
    assert chart(points, label="x", log=False, share=False).count("<circle") == 1
    assert "nothing to draw" in chart(points[:1], label="x", log=False)

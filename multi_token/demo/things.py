"""Common things with an emoji and a one-word name; `things.csv` lists the clearest images first."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from multi_token.errors import MultiTokenError

_WITHOUT_ARTICLE = frozenset(
    ("bacon", "bread", "broccoli", "cheese", "chocolate", "coffee", "corn", "garlic", "popcorn")
)

CATEGORY_PHRASES = {
    "animal": "an animal",
    "clothing": "something to wear",
    "fruit": "a fruit",
    "instrument": "a musical instrument",
    "tool": "a tool",
    "vegetable": "a vegetable",
    "vehicle": "a vehicle",
}
"""Categories that questions are asked about; things of other categories only serve as the wrong
image."""

_UNDECIDED = {
    "animal": frozenset(("body", "figure")),
    "clothing": frozenset(("object", "sport")),
    "fruit": frozenset(("food", "plant", "vegetable")),
    "instrument": frozenset(("object", "tool")),
    "tool": frozenset(("instrument", "object", "sport")),
    "vegetable": frozenset(("food", "fruit", "plant")),
    "vehicle": frozenset(("object", "sport")),
}
"""Category -> other categories whose things may belong to it as well."""


@dataclass(frozen=True)
class Thing:
    """Something with an image and a one-word name."""

    name: str
    character: str
    """The emoji that draws it."""
    category: str

    @property
    def phrase(self) -> str:
        """Name with its article: "a dog", "an owl", "corn"."""
        if self.name in _WITHOUT_ARTICLE:
            return self.name
        # By sound: "an hourglass", but "a unicorn".
        vowel = self.name[0] in "aeio" or self.name in ("hourglass", "umbrella")
        return f"{'an' if vowel else 'a'} {self.name}"


def is_outside(thing: Thing, category: str) -> bool:
    """Return True if the thing is clearly not of the category: a tomato may be a fruit."""
    return thing.category != category and thing.category not in _UNDECIDED[category]


def things(num_names: int) -> list[Thing]:
    """Return the `num_names` clearest things, always in the same order."""
    if not 2 <= num_names <= len(THINGS):
        raise MultiTokenError(f"the demo has 2 to {len(THINGS)} names, got {num_names}")
    return list(THINGS[:num_names])


# Categories are mixed in the table, so that any first N hold most of them, and so do the N
# after those: the first N are trained, the next ones held out.
with Path(__file__).with_name("things.csv").open(encoding="utf-8", newline="") as _file:
    THINGS = tuple(
        Thing(row["name"], row["emoji"], row["category"]) for row in csv.DictReader(_file)
    )

"""What counts as right, and how the pictures are shuffled to prove that they are looked at.

Border: strings and numbers only; no models, files or pictures.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence


def is_exact_name(answer: str, name: str) -> bool:
    """Whether the answer is the name and nothing else, but for case, spaces around, a final dot."""
    return answer.strip().removesuffix(".").rstrip().casefold() == name.casefold()


def contains_name(answer: str, name: str) -> bool:
    """Whether the name stands in the answer as whole words: "cat", but not in "caterpillar"."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", answer, re.IGNORECASE) is not None


def accuracy(pairs: Iterable[tuple[str, str]]) -> float:
    """The part of (answer, name) pairs where the answer is the name."""
    right = [is_exact_name(answer, name) for answer, name in pairs]
    if not right:
        raise ValueError("no answers to count")
    return sum(right) / len(right)


def shuffled_pictures(names: Sequence[str], seed: int) -> list[int]:
    """For each question the index of another question's picture, never one of the same name.

    `names`: what each question's own picture shows. Every picture is used exactly once, so an
    answerer that ignores pictures scores as before and one that looks falls to chance.
    """
    most = max(Counter(names).values(), default=0)
    if 2 * most > len(names):
        raise ValueError(f"{most} of {len(names)} pictures show the same: they cannot be shuffled")
    random_numbers = random.Random(seed)
    pictures = list(range(len(names)))
    random_numbers.shuffle(pictures)
    for i, name in enumerate(names):
        # as no name has more than half, there is always a j whose exchange mends i and keeps j
        while names[pictures[i]] == name:
            j = random_numbers.randrange(len(names))
            if names[j] != name and names[pictures[j]] != name:
                pictures[i], pictures[j] = pictures[j], pictures[i]
    return pictures


def words(text: str) -> list[str]:
    """Lower case, without punctuation."""
    return re.findall(r"[a-z']+", text.lower())


def word_errors(found: Sequence[str], truth: Sequence[str]) -> int:
    """Words to insert, leave out or exchange (Levenshtein's distance)."""
    costs = list(range(len(truth) + 1))
    for i, word in enumerate(found, 1):
        diagonal, costs[0] = costs[0], i
        for j, other in enumerate(truth, 1):
            diagonal, costs[j] = (
                costs[j],
                min(costs[j] + 1, costs[j - 1] + 1, diagonal + (word != other)),
            )
    return costs[-1]

"""Documents made of facts, and questions about them: who has what."""

from __future__ import annotations

import random
from dataclasses import dataclass

# Names and things are one token each, after a space.
_NAMES = """
Aaron Abigail Abraham Adam Adrian Agnes Alan Albert Alex Alexander Alfred Alice Alison Allen Alma
Amanda Amy Andrea Andrew Angela Anna Anne Anthony Antonio April Arnold Arthur Ashley Austin Barbara
Ben Benjamin Bernard Beth Betty Bill Billy Blake Bob Bobby Brad Brett Brian Bruce Bryan Cameron Carl
Carol Caroline Catherine Cecil Charles Charlie Charlotte Chester Chris Christina Christopher Claire
Clara Clark Claude Clifford Colin Craig Curtis Daisy Dale Dan Daniel Dave David Dean Deborah Dennis
Diana Diego Don Donald Dorothy Douglas Duncan Earl Edgar Edith Edmund Edward Eleanor Eli Elizabeth
Ella Ellen Elliott Emily Emma Eric Erin Ernest Esther Ethan Eugene Eva Felix Florence Frances
Francis Frank Fred Frederick Gabriel Gary Geoffrey George Gerald Gilbert Glenn Gordon Grace Greg Guy
Hannah Harold Harry Harvey Heather Helen Henry Herbert Holly Howard Hugh Hugo Ian Iris Isaac Isabel
Ivan Jack Jacob Jake James Jane Janet Jason Jay Jean Jeff Jeffrey Jennifer Jenny Jeremy Jerry Jesse
Jessica Jill Jim Jimmy Joan Joe Joel John Johnny Jonathan Jordan Jose Joseph Josh Joshua Joyce Juan
Judith Julia Julie June Justin Karen Karl Kate Katherine Kathleen Katie Keith Kelly Ken Kenneth
Kevin Kim Kurt Larry Laura Lauren Lawrence Lee Leo Leon Leonard Leslie Lewis Lily Linda Lisa Lloyd
Logan Louis Louise Lucas Lucy Luis Luke Lynn Madison Malcolm Marcus Margaret Maria Marie Mario Mark
Martha Martin Mary Matt Matthew Maurice Max Melissa Michael Michelle Miguel Mike Miriam Mitchell
Mohammed Molly Monica Morgan Muhammad Nancy Naomi Nathan Nathaniel Neil Nelson Nicholas Nick Nicole
Nina Noah Norman Oliver Oscar Otto Owen Patricia Paul Peter
"""
NAMES = tuple(_NAMES.split())
_THINGS = """
apple banana bear bell bird boat book bottle bowl box camera candle car carpet cat chair clock coat
cow crown cup desk doll door drum duck egg fish flag fork goat guitar hammer hat horse key knife
ladder lamp lemon map mirror mouse piano pig ring robot rope ship shoe snake spoon sword tent tree
"""
THINGS = tuple(_THINGS.split())
# of such a length that a chunk holds exactly one
SENTENCES = (
    "{name} lives in this street and keeps a {thing} at home.",
    "In the house of {name} there has always been a {thing}.",
    "Everybody around here knows that {name} once bought a {thing}.",
)


@dataclass(frozen=True)
class Question:
    """Question about a document, with the chunk that holds the answer."""

    document: str
    name: str
    thing: str
    chunk: int

    @property
    def text(self) -> str:
        return f"What does {self.name} have?"

    @property
    def follow_up(self) -> str:
        """Follow-up to a question about another name."""
        return f"And {self.name}?"

    @property
    def answer(self) -> str:
        # The name again: the thing then follows the key by which it is looked up.
        return f"{self.name} {self.thing}"


def is_held_out(name: str, thing: str) -> bool:
    """Return True for pairs that training excludes: every fifth, so that each word occurs."""
    return (NAMES.index(name) + 2 * THINGS.index(thing)) % 5 == 0


def write_document(num_chunks: int, numbers: random.Random, *, held_out: bool) -> list[Question]:
    """A document with all the questions that may be asked about it in training, or held out."""
    facts = []
    for name in numbers.sample(NAMES, num_chunks):
        thing = numbers.choice(THINGS)
        while not held_out and is_held_out(name, thing):
            thing = numbers.choice(THINGS)
        facts.append((name, thing))
    if held_out and not any(is_held_out(*fact) for fact in facts):
        return write_document(num_chunks, numbers, held_out=held_out)
    sentences = (numbers.choice(SENTENCES).format(name=name, thing=thing) for name, thing in facts)
    document = " ".join(sentences)
    return [
        Question(document, name, thing, chunk)
        for chunk, (name, thing) in enumerate(facts)
        if is_held_out(name, thing) == held_out
    ]

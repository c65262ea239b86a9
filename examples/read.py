"""A long document in few tokens: questions whose answer is one sentence of it.

    python examples/read.py [--quick] [--out runs/read] [--seed 0]

A document is a list of facts ("In the house of Anna there has always been a drum."), each a chunk
of its own. all-MiniLM-L6-v2 makes one embedding of each chunk, a projector a few tokens of each
embedding, and SmolLM2-135M-Instruct with LoRA finds the one that is asked for. Training sees short
documents; held out are documents of 1 to 256 chunks, and in them pairs of a name and a thing that
training never showed. Beside it: the word read out of the chunk whose embedding is nearest to the
question's (which sees the text itself), and chance. Writes `report.json` and `report.html`.

Border: everything it does with models goes through the library's own doors: rows in a file, a
recipe, `train` and `generate`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from multi_token.data.cache import FeatureCache
from multi_token.demo.page import Section, Tile, loss_figure, table, write_page
from multi_token.demo.parts import language_model_folder, sentence_encoder_folder
from multi_token.demo.report import machine
from multi_token.demo.scores import is_name
from multi_token.media.fetch import Fetch
from multi_token.modalities.document import DocumentModality
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe import Recipe, parse_recipe
from multi_token.train.run import train
from multi_token.types import Media

SYSTEM = "Look it up."
_NAMES = """
Aaron Abigail Adam Adele Agnes Alan Albert Alice Alma Amanda Amber Amy Andrea Andrew Angela Anita
Anna Anne Anthony April Arthur Ashley Audrey Barbara Beatrice Ben Bernard Beth Betty Blake Bob Brad
Brenda Brian Bridget Bruce Bryan Caleb Cameron Carl Carla Carmen Carol Caroline Catherine Cecil
Charles Charlotte Chloe Chris Claire Clara Claude Colin Connor Craig Cynthia Daisy Daniel David
Dean Deborah Dennis Derek Diana Diego Donald Donna Doris Dorothy Douglas Dylan Edgar Edith Edward
Eileen Elaine Eleanor Elena Eli Ella Ellen Elsa Emily Emma Enzo Eric Erin Ernest Esther Ethan Eva
Evelyn Felix Fiona Florence Frances Frank Fred Gabriel Gary Gavin George Gerald Gina Glen Gloria
Gordon Grace Greg Greta Guy Hannah Harold Harry Heather Hector Heidi Helen Helga Henry Herbert Hugh
Hugo Ian Igor Ingrid Irene Iris Isaac Isabel Ivan Jack Jacob James Jane Janet Jason Jean Jenny
Jeremy Jerry Jessica Jill Joan Joel John Jonas Jordan Joseph Joyce Juan Judith Julia Julie June
Karen Karl Kate Keith Kelly Ken Kevin Kim Kurt Kyle Lara Larry Laura Lauren Leah Leo Leon Leonard
Leslie Liam Linda Lisa Logan Lois Louis Louise Lucas Lucy Luis Luke Lydia Mabel Madison Marcus
Margaret Maria Marie Mark Martha Martin Marvin Mary Matthew Maurice Max Megan Michael Miguel Mike
Miriam Molly Monica Morgan Nancy Naomi Natalie Nathan Neil Nicole Nigel Nina Noah Nora Norman Oliver
Olga Oscar Otto Owen Pamela Patrick Paul Paula Pedro Peggy Percy Peter Philip Phoebe Rachel Ralph
Ramon Raymond Rebecca Rita Robert Robin Roger Roland Ron Rosa Rose Roy Ruby Russell Ruth Ryan Sally
Sam Samuel
"""
NAMES = tuple(_NAMES.split())[:256]
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
CHUNK_TOKENS = 20
_MAX_NEW_TOKENS = 8
_BATCH_SIZE = 4


@dataclass(frozen=True)
class Size:
    """How much is made, learned and asked."""

    tokens_per_chunk: tuple[int, ...] = (4, 1)
    """Each is a training of its own; the first is the one that the report is about."""
    training_lengths: tuple[int, ...] = (2, 4, 8, 16)
    num_documents: int = 400
    num_captions: int = 800
    """Documents of one chunk, which the closed-form start is fitted on."""
    num_steps: int = 120
    batch_size: int = 16
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Chunks of the held-out documents."""
    num_asked: int = 32
    """Questions about documents of each length."""


QUICK = Size(
    tokens_per_chunk=(4,),
    training_lengths=(2, 4),
    num_documents=20,
    num_captions=60,
    num_steps=8,
    batch_size=8,
    lengths=(1, 4, 16),
    num_asked=4,
)


@dataclass(frozen=True)
class Question:
    """A question about a document, and where the answer stands in it."""

    document: str
    name: str
    thing: str
    chunk: int

    @property
    def text(self) -> str:
        return f"What does {self.name} have?"

    @property
    def answer(self) -> str:
        # the name again: what is looked up then stands right behind what it is looked up by
        return f"{self.name} {self.thing}"

    def row(self, *, answered: bool) -> dict[str, Any]:
        """As any user would write it."""
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"<document>\n{self.text}"},
        ]
        if answered:
            messages.append({"role": "assistant", "content": self.answer})
        return {"documents": [{"text": self.document}], "messages": messages}


@dataclass(frozen=True)
class Length:
    """What came out for documents of one length."""

    num_chunks: int
    num_asked: int
    accuracy: float
    nearest_accuracy: float
    num_tokens: int
    """Of the language model, for the document."""
    num_text_tokens: int
    """What the text itself would take."""
    encode_seconds: float
    """From the text to its features, a document."""
    answer_seconds: float
    """A question."""
    peak_megabytes: float
    """Most memory that the process has had so far; lengths are asked from short to long."""


def is_held_out(name: str, thing: str) -> bool:
    """Whether training never shows this pair: every fifth, so that each word is seen."""
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


def write_rows(folder: Path, size: Size, seed: int) -> None:
    """`captions.jsonl` (one fact each) and `questions.jsonl` (four about each document)."""
    numbers = random.Random(seed)
    captions = [
        q for _ in range(size.num_captions) for q in write_document(1, numbers, held_out=False)
    ]
    questions = []
    for i in range(size.num_documents):
        length = size.training_lengths[i % len(size.training_lengths)]
        about = write_document(length, numbers, held_out=False)
        questions += numbers.sample(about, min(4, len(about)))
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("captions", captions), ("questions", questions)):
        lines = (json.dumps(question.row(answered=True)) + "\n" for question in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def held_out_questions(num_chunks: int, size: Size, seed: int) -> list[Question]:
    """Questions about new documents, at most eight about each."""
    numbers = random.Random(f"{seed}/{num_chunks}")
    questions: list[Question] = []
    while len(questions) < size.num_asked:
        about = write_document(num_chunks, numbers, held_out=True)
        questions += numbers.sample(about, min(8, len(about)))
    return questions[: size.num_asked]


def recipe(data: Path, out: Path, size: Size, factor: int, seed: int) -> Recipe:
    """The recipe of this example: the same keys as any user's."""
    fields: dict[str, Any] = {
        "model": {
            "language_model": str(language_model_folder()),
            "modalities": {
                "document": {
                    "type": "document",
                    "encoder": str(sentence_encoder_folder()),
                    "normalize": True,
                    "chunk_tokens": CHUNK_TOKENS,
                    "projector": {"type": "expand", "factor": factor},
                }
            },
        },
        "data": {
            "train": [
                {"rows": str(data / "captions.jsonl")},
                {"rows": str(data / "questions.jsonl")},
            ]
        },
        "train": {
            "output_dir": str(out),
            "seed": seed,
            "align": {
                "rows": [{"rows": str(data / "captions.jsonl")}],
                "caption_format": "{caption}",
            },
            "feature_cache": True,
            "adapter": {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            "stages": [
                {
                    "name": "read",
                    "learn": {"projectors": 1e-3, "projector_biases": 3e-3, "adapter": 1e-3},
                    "args": {"max_steps": size.num_steps, "lr_scheduler_type": "cosine"},
                }
            ],
            "args": {
                "per_device_train_batch_size": size.batch_size,
                "train_sampling_strategy": "group_by_length",
                "logging_steps": 2,
                "use_cpu": True,
            },
        },
    }
    return parse_recipe(json.dumps(fields), where="the recipe of read")


class Exam:
    """Asks a model about held-out documents, with their features remembered."""

    def __init__(self, model: MultiTokenForConditionalGeneration) -> None:
        assert model.reader is not None
        self.model = model
        self.cache = FeatureCache()
        model.reader = replace(model.reader, cache=self.cache)
        modality = model.modalities["document"]
        assert isinstance(modality, DocumentModality)
        self.modality = modality

    def ask(self, num_chunks: int, questions: Sequence[Question]) -> tuple[Length, list[str]]:
        """The numbers for documents of one length, and every answer."""
        documents = list(dict.fromkeys(q.document for q in questions))
        for document in documents:
            assert len(self.modality.chunks(document)) == num_chunks, document
        started = time.perf_counter()
        self._encode(documents)
        encoded = time.perf_counter()
        answers = self.model.generate(
            [q.row(answered=False) for q in questions],
            max_new_tokens=_MAX_NEW_TOKENS,
            batch_size=_BATCH_SIZE,
        )
        answered = time.perf_counter()
        right = [is_name(a, q.answer) for a, q in zip(answers, questions, strict=True)]
        nearest = [
            chunk == q.chunk for chunk, q in zip(self._nearest(questions), questions, strict=True)
        ]
        assert self.model.reader is not None
        tokenizer = self.model.reader.tokenizer
        return Length(
            num_chunks=num_chunks,
            num_asked=len(questions),
            accuracy=_share(right),
            nearest_accuracy=_share(nearest),
            num_tokens=self.modality.num_tokens(num_chunks),
            num_text_tokens=sum(len(tokenizer(d)["input_ids"]) for d in documents)
            // len(documents),
            encode_seconds=round((encoded - started) / len(documents), 3),
            answer_seconds=round((answered - encoded) / len(questions), 3),
            peak_megabytes=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        ), answers

    def _encode(self, texts: Sequence[str]) -> list[Tensor]:
        """The embeddings [chunks, dim] of each text."""
        encoders: Any = self.model.encoders
        items = [Media("document", {"text": text}) for text in texts]
        self.cache.fill([(item, Fetch()) for item in items], self.model.modalities, encoders)
        found = (self.cache.find(item, self.modality, Fetch()) for item in items)
        return [prepared.inputs["features"] for prepared in found if prepared is not None]

    def _nearest(self, questions: Sequence[Question]) -> Iterator[int]:
        """The chunk most similar to each question (cosine; embeddings have length 1)."""
        chunks = self._encode([q.document for q in questions])
        asked = self._encode([q.text for q in questions])
        for document, question in zip(chunks, asked, strict=True):
            yield int((document @ question[0]).argmax())


def run(out: Path, size: Size, seed: int, console: Console) -> dict[str, Any]:
    """Everything, with the report written to `out`; returns its numbers."""
    began = time.perf_counter()
    write_rows(out / "data", size, seed)
    results: dict[int, list[Length]] = {}
    samples: list[tuple[int, Question, str]] = []
    train_seconds: dict[int, float] = {}
    for factor in size.tokens_per_chunk:
        console.rule(f"{factor} tokens a chunk")
        started = time.perf_counter()
        folder = out / f"tokens_{factor}"
        exam = Exam(train(recipe(out / "data", folder, size, factor, seed), console=console))
        train_seconds[factor] = round(time.perf_counter() - started, 1)
        results[factor] = []
        for num_chunks in size.lengths:
            questions = held_out_questions(num_chunks, size, seed)
            length, answers = exam.ask(num_chunks, questions)
            results[factor].append(length)
            console.print(
                f"{num_chunks} chunks: {length.accuracy:.1%} of {length.num_asked} right, nearest "
                f"chunk {length.nearest_accuracy:.1%}, {length.answer_seconds} s a question",
                highlight=False,
            )
            if factor == size.tokens_per_chunk[0]:
                samples += [
                    (num_chunks, q, a) for q, a in zip(questions[:3], answers[:3], strict=True)
                ]
    main_results = results[size.tokens_per_chunk[0]]
    report: dict[str, Any] = {
        "held_out_accuracy": _share_of(main_results, "accuracy"),
        "nearest_accuracy": _share_of(main_results, "nearest_accuracy"),
        "chance_accuracy": round(1 / len(THINGS), 4),
        "tokens_per_chunk": size.tokens_per_chunk[0],
        "num_steps": size.num_steps,
        "train_seconds": sum(train_seconds.values()),
        "total_seconds": round(time.perf_counter() - began, 1),
        "seed": seed,
        "by_tokens": {str(f): [asdict(length) for length in found] for f, found in results.items()},
        "machine": machine(),
    }
    stage = out / f"tokens_{size.tokens_per_chunk[0]}" / "stages" / "1-read" / "done.json"
    history = json.loads(stage.read_text(encoding="utf-8"))["log_history"]
    losses = [(log["step"], log["loss"]) for log in history if "loss" in log]
    (out / "report.json").write_text(
        json.dumps({**report, "losses": losses}, indent=2) + "\n", "utf-8"
    )
    _write_page(out / "report.html", report, results, samples, losses)
    return report


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / len(right), 4)


def _share_of(lengths: Sequence[Length], field: str) -> float:
    """The mean over lengths."""
    return round(sum(getattr(length, field) for length in lengths) / len(lengths), 4)


def _write_page(
    path: Path,
    report: dict[str, Any],
    results: dict[int, list[Length]],
    samples: Sequence[tuple[int, Question, str]],
    losses: Sequence[tuple[int, float]],
) -> None:
    main_results = results[report["tokens_per_chunk"]]
    longest = main_results[-1]
    by_length = [
        [
            f"{length.num_chunks} chunks",
            *(f"{found[i].accuracy:.0%}" for found in results.values()),
            f"{length.nearest_accuracy:.0%}",
            length.num_tokens,
            length.num_text_tokens,
            f"{length.encode_seconds:.2f} s",
            f"{length.answer_seconds:.2f} s",
            f"{length.peak_megabytes:.0f} MB",
        ]
        for i, length in enumerate(main_results)
    ]
    by_tokens = [f"{factor} tokens" for factor in results]
    columns = ["", *by_tokens, "nearest chunk", "tokens", "as text", "encoding", "a question"]

    def accuracy(label: str, key: str, note: str) -> Tile:
        return Tile(label, f"{report[key]:.0%}", note, report[key])

    write_page(
        path,
        title="A language model reads long documents in few tokens",
        claim=f"Each sentence of a document became <strong>{report['tokens_per_chunk']} tokens"
        "</strong>, made of one embedding. Asked for a fact, the model is right in <strong>"
        f"{report['held_out_accuracy']:.0%}</strong> of questions about new documents of 1 to "
        f"{longest.num_chunks} sentences.",
        tiles=[
            accuracy("Held out", "held_out_accuracy", "mean over all lengths"),
            accuracy("Nearest chunk", "nearest_accuracy", "which sees the text itself"),
            accuracy("Chance", "chance_accuracy", f"one of {len(THINGS)} things"),
            Tile(
                "Training",
                f"{report['train_seconds'] / 60:.1f} min",
                f"{len(results)} times {report['num_steps']} steps",
            ),
        ],
        sections=[
            Section(
                "By length",
                "Exact answers by tokens a chunk; tokens, times and memory are those of the first.",
                table([*columns, "peak memory"], by_length),
            ),
            Section(
                "Questions",
                "About held-out documents.",
                table(
                    ["asked", "of chunks", "answer", "truth"],
                    [(q.text, n, answer or "(none)", q.answer) for n, q, answer in samples],
                ),
            ),
            Section("Training", f"{report['num_steps']} steps.", loss_figure(losses)),
        ],
        facts={
            "Made of": {
                "language model": "SmolLM2-135M-Instruct, with LoRA",
                "encoder": "all-MiniLM-L6-v2, frozen",
                "projector": "closed form (frozen) + MLP, for each chunk",
            },
            "Machine": report["machine"],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/read"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small one in about a minute")
    options = parser.parse_args()
    console = Console(stderr=True)
    report = run(options.out, QUICK if options.quick else Size(), options.seed, console)
    for key, value in report.items():
        if isinstance(value, (int, float)):
            shown = f"{value:.1%}" if key.endswith("accuracy") else value
            console.print(f"{key.replace('_', ' '):28} {shown}", highlight=False)
    console.print(f"\nlook:  {options.out / 'report.html'}", highlight=False)


if __name__ == "__main__":
    main()

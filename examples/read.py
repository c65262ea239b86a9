"""A long document in few tokens: questions whose answer is one sentence of it.

    python examples/read.py [--quick | --compare] [--out runs/read] [--seed 0]

A document is a list of facts ("In the house of Anna there has always been a drum."), each a chunk
of its own. all-MiniLM-L6-v2 makes one embedding of each chunk, a projector a few tokens of each
embedding, and SmolLM2-135M-Instruct with LoRA finds the one that is asked for. Training sees
documents of 8 to 48 chunks; held out are documents of 1 to 256, and in them the pairs of a name and
a thing that are asked for. Beside it: the chunk whose embedding is nearest to the question's (a
search, without an answer), and chance. `--compare` trains with 2, 4 and 1
tokens a chunk, 60 steps each. Writes `report.json` and `report.html`.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parts.command import run_command, stage_losses
from parts.encoders import sentence_encoder_folder
from parts.facts import THINGS, Question, write_document
from parts.page import ReportSection, Tile, loss_figures, table, write_page
from rich.console import Console
from torch import Tensor

from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.demo.parts import language_model_folder
from multi_token.demo.run import is_exact_name
from multi_token.media.fetch import Fetch
from multi_token.modalities.document import DocumentModality
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe, parse_recipe
from multi_token.report.machine import machine_facts
from multi_token.train.plan.estimate import peak_memory
from multi_token.train.run import train
from multi_token.types import Media

CHUNK_TOKENS = 20
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
)
"""Nothing beside the words; the model's own has 14 tokens a question, and each costs time."""
_ALIGN: dict[int, dict[str, str]] = {
    1: {"caption_format": " {caption}", "targets": "mean"},
    2: {"caption_format": " {caption}", "targets": "by_position"},
    4: {"caption_format": " {caption} {caption}", "targets": "by_position"},
}
"""Targets of the closed form by number of tokens: a name and its thing, one token each."""
_MAX_NEW_TOKENS = 4
_BATCH_SIZE = 4


@dataclass(frozen=True)
class Size:
    """Numbers of documents, steps and questions."""

    tokens_per_chunk: tuple[int, ...] = (2,)
    """Each is a training of its own; the first is the one that the report is about."""
    training_lengths: tuple[int, ...] = (8, 16, 32, 48)
    num_documents: int = 1000
    num_questions: int = 8
    """About each document, at most; in training they are one conversation."""
    num_captions: int = 3000
    """Documents of one chunk, which the closed-form start is fitted on."""
    num_steps: int = 160
    batch_size: int = 8
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Chunks of the held-out documents."""
    num_asked: int = 48
    """Questions about documents of each length."""


QUICK = Size(
    tokens_per_chunk=(2,),
    training_lengths=(2, 4),
    num_documents=32,
    num_captions=200,
    num_steps=8,
    batch_size=4,
    lengths=(1, 4, 16),
    num_asked=4,
)
OTHERS = {
    "compare": (
        "three shorter trainings: 2, 4 and 1 tokens a chunk, 60 steps each",
        Size(tokens_per_chunk=(2, 4, 1), num_steps=60, lengths=(1, 8, 32, 128)),
    )
}


def row(questions: Sequence[Question], *, answered: bool) -> dict[str, Any]:
    """A conversation about one document, as any user would write it."""
    messages = []
    for i, question in enumerate(questions):
        text = f"\n{question.follow_up}" if i else f"<document>\n{question.text}"
        messages.append({"role": "user", "content": text})
        if answered:
            messages.append({"role": "assistant", "content": f" {question.answer}"})
    return {"documents": [{"text": questions[0].document}], "messages": messages}


@dataclass(frozen=True)
class Length:
    """Results for documents of one length."""

    num_chunks: int
    num_asked: int
    accuracy: float
    nearest_accuracy: float
    num_tokens: int
    """Media embeddings of the document."""
    num_text_tokens: int
    """Tokens of the document as text."""
    encode_seconds: float
    """From the text to its features, a document."""
    answer_seconds: float
    """A question, without encoding."""
    answer_megabytes: float
    """The most that tensors took beside the model while four questions were read at once."""


def write_rows(folder: Path, size: Size, seed: int) -> None:
    """`captions.jsonl` (one fact each) and `questions.jsonl` (a conversation a document)."""
    numbers = random.Random(seed)
    captions = []
    for _ in range(size.num_captions):
        (question,) = write_document(1, numbers, held_out=False)
        captions.append(row([question], answered=True))
    rows = []
    for i in range(size.num_documents):
        length = size.training_lengths[i % len(size.training_lengths)]
        about = write_document(length, numbers, held_out=False)
        asked = numbers.sample(about, min(size.num_questions, len(about)))
        rows.append(row(asked, answered=True))
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("captions", captions), ("questions", rows)):
        lines = "".join(json.dumps(each) + "\n" for each in some)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def held_out_questions(num_chunks: int, size: Size, seed: int) -> list[Question]:
    """Questions about new documents, several about each where it has them."""
    numbers = random.Random(f"{seed}/{num_chunks}")
    questions: list[Question] = []
    # A generator per length: other lengths of the table leave these questions as they are.
    while len(questions) < size.num_asked:
        about = write_document(num_chunks, numbers, held_out=True)
        questions += numbers.sample(about, min(size.num_questions, len(about)))
    return questions[: size.num_asked]


def recipe(data: Path, out: Path, size: Size, factor: int, seed: int) -> Recipe:
    """The recipe of this example: the same keys as any user's."""
    fields: dict[str, Any] = {
        "model": {
            "language_model": str(language_model_folder()),
            "chat_template": TEMPLATE,
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
        "data": {"train": [{"rows": str(data / "questions.jsonl")}]},
        "train": {
            "output_dir": str(out),
            "seed": seed,
            # sentences of one form differ little: a small penalty, or names come out as their mean
            "closed_form": {
                "rows": [{"rows": str(data / "captions.jsonl")}],
                "penalty": 10.0,
                **_ALIGN[factor],
            },
            "feature_cache": True,
            "adapter": {
                "r": 32,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            },
            "stages": [
                {
                    "name": "read",
                    "learn": {"projectors": 1e-4, "adapter": 2e-3},
                    "args": {"max_steps": size.num_steps, "warmup_steps": 5},
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
        assert model.processor is not None
        self.model = model
        self.cache = FeatureCache()
        self.processor = model.processor = replace(model.processor, cache=self.cache)
        modality = model.modalities["document"]
        assert isinstance(modality, DocumentModality)
        self.modality = modality

    def ask(self, num_chunks: int, questions: Sequence[Question]) -> tuple[Length, list[str]]:
        """The numbers for documents of one length, and every answer."""
        documents = list(dict.fromkeys(q.document for q in questions))
        # A chunk is exactly a sentence, or "the nearest chunk" would not be the fact.
        for document in documents:
            assert len(self.modality.chunks(document)) == num_chunks, document
        started = time.perf_counter()
        # Before the clock of the answers: a document is encoded once for many questions.
        self._encode(documents)
        encoded = time.perf_counter()
        asked = [row([q], answered=False) for q in questions]
        answers = self.model.generate(asked, max_new_tokens=_MAX_NEW_TOKENS, batch_size=_BATCH_SIZE)
        answered = time.perf_counter()
        with peak_memory() as peak:  # apart, since watching takes time
            self.model.generate(asked[:_BATCH_SIZE], max_new_tokens=1, batch_size=_BATCH_SIZE)
        right = [is_exact_name(a, q.answer) for a, q in zip(answers, questions, strict=True)]
        nearest = [
            chunk == q.chunk for chunk, q in zip(self._nearest(questions), questions, strict=True)
        ]
        text_tokens = [len(self.processor.tokenizer(d)["input_ids"]) for d in documents]
        return Length(
            num_chunks=num_chunks,
            num_asked=len(questions),
            accuracy=_mean(right),
            nearest_accuracy=_mean(nearest),
            num_tokens=self.modality.num_tokens(num_chunks),
            num_text_tokens=round(_mean(text_tokens)),
            encode_seconds=round((encoded - started) / len(documents), 3),
            answer_seconds=round((answered - encoded) / len(questions), 3),
            answer_megabytes=round(peak[0] / 2**20, 1),
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
    train_seconds: dict[str, float] = {}
    losses: dict[str, list[tuple[int, float]]] = {}
    for factor in size.tokens_per_chunk:
        console.rule(name := _tokens(factor))
        started = time.perf_counter()
        folder = out / f"tokens_{factor}"
        exam = Exam(train(recipe(out / "data", folder, size, factor, seed), console=console))
        train_seconds[name] = round(time.perf_counter() - started, 1)
        losses[name] = stage_losses(folder)
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
        "held_out_accuracy": _mean([length.accuracy for length in main_results]),
        "longest_accuracy": main_results[-1].accuracy,
        "nearest_accuracy": _mean([length.nearest_accuracy for length in main_results]),
        "chance_accuracy": round(1 / len(THINGS), 4),
        "tokens_per_chunk": size.tokens_per_chunk[0],
        "num_steps": size.num_steps,
        "train_seconds": train_seconds,
        "total_seconds": round(time.perf_counter() - began, 1),
        "seed": seed,
        "by_tokens": {str(f): [asdict(length) for length in found] for f, found in results.items()},
        "losses": losses,
        "machine": machine_facts(),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _write_page(out / "report.html", report, results, samples)
    return report


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def _tokens(factor: int) -> str:
    return f"{factor} token{'s' if factor > 1 else ''} a chunk"


def _write_page(
    path: Path,
    report: dict[str, Any],
    results: dict[int, list[Length]],
    samples: Sequence[tuple[int, Question, str]],
) -> None:
    main_results = results[report["tokens_per_chunk"]]
    longest = main_results[-1]
    by_length = [
        [
            length.num_chunks,
            *(f"{found[i].accuracy:.0%}" for found in results.values()),
            f"{length.nearest_accuracy:.0%}",
            length.num_tokens,
            length.num_text_tokens,
            f"{length.encode_seconds:.2f} s",
            f"{length.answer_seconds:.2f} s",
            f"{length.answer_megabytes:.0f} MB",
        ]
        for i, length in enumerate(main_results)
    ]

    def accuracy(label: str, key: str, note: str) -> Tile:
        return Tile(label, f"{report[key]:.0%}", note, report[key])

    columns = ["chunks", *map(_tokens, results), "nearest chunk"]
    costs = ["tokens", "as text", "encoding", "a question", "memory"]
    seconds = sum(report["train_seconds"].values())
    write_page(
        path,
        title="A language model reads long documents in few tokens",
        claim=f"Each sentence of a document became <strong>{report['tokens_per_chunk']} tokens"
        "</strong>, made of one embedding. Asked for a fact, the model is right in <strong>"
        f"{report['held_out_accuracy']:.0%}</strong> of questions about new documents of "
        f"{main_results[0].num_chunks} to {longest.num_chunks} sentences.",
        tiles=[
            accuracy("Held out", "held_out_accuracy", "mean over all lengths"),
            accuracy("The longest", "longest_accuracy", f"{longest.num_chunks} chunks"),
            accuracy("Nearest chunk", "nearest_accuracy", "a search, which reads nothing"),
            accuracy("Chance", "chance_accuracy", f"one of {len(THINGS)} things"),
            Tile(
                "Training",
                f"{seconds / 60:.1f} min",
                f"{report['num_steps']} steps"
                + (f", {len(results)} times" if len(results) > 1 else ""),
            ),
        ],
        sections=[
            ReportSection(
                "By length",
                f"Exact answers. Tokens, times and memory are those of {columns[1]}; memory is "
                f"what {_BATCH_SIZE} questions at once took beside the model.",
                table([*columns, *costs], by_length),
            ),
            ReportSection(
                "Questions",
                "About held-out documents.",
                table(
                    ["asked", "chunks", "answer", "truth"],
                    [(q.text, n, answer or "(none)", q.answer) for n, q, answer in samples],
                ),
            ),
            ReportSection(
                "Training", f"{report['num_steps']} steps.", loss_figures(report["losses"])
            ),
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


if __name__ == "__main__":
    run_command("read", __doc__ or "", run, full=Size(), quick=QUICK, others=OTHERS)

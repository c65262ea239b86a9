"""Spoken commands: a language model transcribes speakers that it was not trained on.

    python examples/listen.py [--quick] [--out runs/listen] [--seed 0]

Many synthetic voices say commands such as "turn on the kitchen light". Whisper tiny.en's encoder
and SmolLM2-135M-Instruct stay frozen; a projector between them is trained. Speakers are held out,
and sentences whose words occur in others. The baseline knows the same encoder and
the same utterances: it answers with the sentence of the nearest one. Writes `report.json` and
`report.html`.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from parts.command import run_command, stage_losses
from parts.encoders import speech_encoder_folder
from parts.page import ReportSection, Tile, loss_figure, table, write_page
from parts.voices import Voice, record
from rich.console import Console
from torch import Tensor

from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.demo.parts import language_model_folder
from multi_token.demo.report import Example, sheet_of
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe, parse_recipe
from multi_token.report.machine import machine_facts
from multi_token.train.run import train
from multi_token.types import Media

SYSTEM = "Write down what you hear."
VERBS = ("turn on", "turn off", "open", "close", "lock", "check", "clean", "move")
PLACES = ("kitchen", "bedroom", "garage", "office", "bathroom", "garden", "attic", "balcony")
THINGS = ("light", "heater", "window", "door", "fan", "radio", "camera", "curtain")
ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-029")
SPEAKERS = (*(f"f{i}" for i in range(1, 6)), *(f"m{i}" for i in range(1, 8)))

GROUPS = NEW_BOTH, NEW_VOICE, NEW_SENTENCE = "new voice, new sentence", "new voice", "new sentence"
_MAX_NEW_TOKENS = 12


@dataclass(frozen=True)
class Size:
    """Numbers of utterances, steps and questions."""

    num_sentences: int = 400
    """Different sentences in training; the others of the grammar are held out."""
    num_speakers: int = 9
    """Speakers in training, in every accent; the others are held out."""
    num_utterances: int = 400
    num_steps: int = 120
    batch_size: int = 16
    num_asked: int = 60
    """Utterances of the hardest group; each of the two others has half as many."""


QUICK = Size(num_sentences=24, num_utterances=24, num_steps=8, batch_size=8, num_asked=4)


@dataclass(frozen=True)
class Utterance:
    """Sentence spoken by one voice, in a file."""

    sentence: str
    voice: Voice
    path: str
    group: str = "training"

    @property
    def row(self) -> dict[str, Any]:
        """The question about it, without an answer."""
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "<speech>"},
        ]
        return {"id": self.path, "speechs": [self.path], "messages": messages}


@dataclass(frozen=True)
class Answers:
    """Transcripts of the held-out utterances by one system."""

    listener: str
    texts: Sequence[str]

    def scores(self, asked: Sequence[Utterance], group: str) -> tuple[float, float]:
        """Exact sentences and word error rate within a group."""
        pairs = [
            (words(text), words(utterance.sentence))
            for text, utterance in zip(self.texts, asked, strict=True)
            if utterance.group == group
        ]
        exact = sum(found == truth for found, truth in pairs) / len(pairs)
        num_wrong = sum(word_errors(found, truth) for found, truth in pairs)
        return round(exact, 4), round(num_wrong / sum(len(truth) for _, truth in pairs), 4)


def split_sentences(num_training: int, numbers: random.Random) -> tuple[list[str], list[str]]:
    """Training and held-out sentences; every word of the grammar is in the training ones."""
    grid = list(product(range(len(VERBS)), range(len(PLACES)), range(len(THINGS))))
    # Each word of the grammar occurs in training, or a held-out sentence could not be written.
    first = [(i, i, i) for i in range(len(VERBS))]
    rest = [cell for cell in grid if cell not in first]
    numbers.shuffle(rest)
    texts = [f"{VERBS[v]} the {PLACES[p]} {THINGS[t]}" for v, p, t in first + rest]
    return texts[:num_training], texts[num_training:]


class Booth:
    """Folder of utterances, made in a fixed order, so that they are the same in every run."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.numbers = random.Random(seed)
        self.count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def record(self, sentence: str, speaker: str, group: str) -> Utterance:
        """The sentence in the speaker's voice, with an accent, a pitch and a pace of the moment."""
        voice = Voice(
            f"{self.numbers.choice(ACCENTS)}+{speaker}",
            pitch=self.numbers.randint(35, 65),
            rate=self.numbers.randint(150, 200),
        )
        path = self.folder / f"{self.count:04}.wav"
        self.count += 1
        record(sentence, voice, path)
        return Utterance(sentence, voice, path.name, group)


def record_all(folder: Path, size: Size, seed: int) -> tuple[list[Utterance], list[Utterance]]:
    """The training utterances and the held-out ones."""
    numbers = random.Random(seed)
    known, new = split_sentences(size.num_sentences, numbers)
    speakers = numbers.sample(SPEAKERS, len(SPEAKERS))
    heard, unheard = speakers[: size.num_speakers], speakers[size.num_speakers :]
    # One booth, in a fixed order: the synthesizer carries state from one sentence to the next.
    booth = Booth(folder, seed)
    training = [
        booth.record(known[i % len(known)], heard[i % len(heard)], "training")
        for i in range(size.num_utterances)
    ]
    asked = [
        booth.record(numbers.choice(sentences), voices[i % len(voices)], group)
        for group, sentences, voices, num in (
            (NEW_BOTH, new, unheard, size.num_asked),
            (NEW_VOICE, known[: size.num_utterances], unheard, size.num_asked // 2),
            (NEW_SENTENCE, new, heard, size.num_asked // 2),
        )
        for i in range(num)
    ]
    return training, asked


def recipe(data: Path, out: Path, size: Size, seed: int) -> Recipe:
    """The recipe of this example: the same keys as any user's."""
    fields: dict[str, Any] = {
        "model": {
            "language_model": str(language_model_folder()),
            "modalities": {
                "speech": {
                    "type": "speech",
                    "encoder": str(speech_encoder_folder()),
                    "projector": {"type": "stack", "factor": 8},
                }
            },
        },
        "data": {"train": [{"rows": str(data / "rows.jsonl")}]},
        "train": {
            "output_dir": str(out),
            "seed": seed,
            "closed_form": {"targets": "by_position"},
            "feature_cache": True,
            "packing": {"share": True},
            "stages": [
                {
                    "name": "projector",
                    "learn": {"projectors": 1e-3},
                    "args": {"max_steps": size.num_steps, "lr_scheduler_type": "cosine"},
                }
            ],
            "args": {
                "per_device_train_batch_size": size.batch_size,
                "logging_steps": 2,
                "use_cpu": True,
            },
        },
    }
    return parse_recipe(json.dumps(fields), where="the recipe of listen")


class Ear:
    """The encoder's features of utterances, from the run's cache."""

    def __init__(
        self, model: MultiTokenForConditionalGeneration, data: Path, cache: FeatureCache
    ) -> None:
        self.model = model
        self.fetch = Fetch(root=str(data))
        self.cache = cache

    def hear(self, utterances: Sequence[Utterance]) -> None:
        """Encode what is not in the cache yet."""
        items = [(Media("speech", u.path), self.fetch) for u in utterances]
        encoders: Any = self.model.encoders
        self.cache.fill(items, self.model.modalities, encoders)

    def means(self, utterances: Sequence[Utterance]) -> Tensor:
        """[utterances, dim]: the mean of each one's frames."""
        found = [
            self.cache.find(Media("speech", u.path), self.model.modalities["speech"], self.fetch)
            for u in utterances
        ]
        return torch.stack([f.inputs["features"].mean(0) for f in found if f is not None])


def nearest_sentences(
    ear: Ear, training: Sequence[Utterance], asked: Sequence[Utterance]
) -> Answers:
    """The sentence of the training utterance with the most similar mean frame (cosine).

    About the training utterances' common mean, without which all are similar.
    """
    known, new = ear.means(training), ear.means(asked)
    centre = known.mean(0)
    normalize = torch.nn.functional.normalize
    similar = normalize(new - centre, dim=1) @ normalize(known - centre, dim=1).T
    best = similar.argmax(1).tolist()
    return Answers("nearest utterance", [training[index].sentence for index in best])


def whispered(data: Path, asked: Sequence[Utterance], model: Any) -> Answers:
    """Transcribe with Whisper's own decoder, trained on 680,000 hours, as a reference."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    folder = speech_encoder_folder()
    whisper: Any = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    # As many new tokens as the trained model may write, beside Whisper's own prompt.
    whisper.generation_config.max_length = _MAX_NEW_TOKENS + 4
    processor: Any = WhisperProcessor.from_pretrained(folder)
    fetch = Fetch(root=str(data))
    texts: list[str] = []
    for start in range(0, len(asked), 10):
        waves = [model.modalities["speech"].load(u.path, fetch) for u in asked[start : start + 10]]
        inputs = processor(
            waves, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True
        )
        ids = whisper.generate(**inputs)
        texts += processor.batch_decode(ids, skip_special_tokens=True)
    return Answers("Whisper tiny.en itself", texts)


def run(out: Path, size: Size, seed: int, console: Console) -> dict[str, Any]:
    """Everything, with the report written to `out`; returns its numbers."""
    began = time.perf_counter()
    data = out / "data"
    training, asked = record_all(data, size, seed)
    rows = [
        {**u.row, "messages": [*u.row["messages"], {"role": "assistant", "content": u.sentence}]}
        for u in training
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (data / "rows.jsonl").write_text(text, encoding="utf-8")

    started = time.perf_counter()
    model = train(recipe(data, out, size, seed), console=console)
    train_seconds = time.perf_counter() - started

    cache = FeatureCache(out / "cache")
    ear = Ear(model, data, cache)
    ear.hear([*training, *asked])
    assert model.processor is not None
    # The features of the baseline serve the model, too: each utterance is encoded once.
    model.processor = replace(model.processor, cache=cache)
    texts = model.generate(
        [u.row for u in asked], root=str(data), max_new_tokens=_MAX_NEW_TOKENS, batch_size=25
    )
    listeners = [
        Answers("SmolLM2 with the projector", texts),
        nearest_sentences(ear, training, asked),
        whispered(data, asked, model),
    ]
    scores = {
        listener.listener: {group: listener.scores(asked, group) for group in GROUPS}
        for listener in listeners
    }
    ours, nearest, whisper = (scores[listener.listener][NEW_BOTH] for listener in listeners)
    report: dict[str, Any] = {
        "held_out_accuracy": ours[0],
        "held_out_word_error_rate": ours[1],
        "nearest_accuracy": nearest[0],
        "nearest_word_error_rate": nearest[1],
        "whisper_accuracy": whisper[0],
        "whisper_word_error_rate": whisper[1],
        "new_voice_accuracy": scores[listeners[0].listener][NEW_VOICE][0],
        "new_sentence_accuracy": scores[listeners[0].listener][NEW_SENTENCE][0],
        "num_utterances": len(training),
        "num_steps": size.num_steps,
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.perf_counter() - began, 1),
        "seed": seed,
        "machine": machine_facts(),
    }
    losses = stage_losses(out)
    examples = [
        {"sentence": u.sentence, "voice": u.voice.name, "group": u.group, "path": u.path}
        | {listener.listener: listener.texts[i] for listener in listeners}
        for i, u in enumerate(asked)
    ]
    fields = {**report, "scores": scores, "losses": losses, "examples": examples}
    (out / "report.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    _page(out, report, scores, losses, asked, texts)
    return report


def _page(
    out: Path,
    report: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, tuple[float, float]]],
    losses: Sequence[tuple[int, float]],
    asked: Sequence[Utterance],
    texts: Sequence[str],
) -> None:
    def percent(key: str) -> str:
        return f"{report[key]:.1%}"

    rows = [
        [f"{listener}: {group}", f"{exact:.1%}", f"{wrong:.1%}"]
        for listener, groups in scores.items()
        for group, (exact, wrong) in groups.items()
    ]
    shown = list(zip(asked, texts, strict=True))[:: max(1, len(asked) // 12)]
    write_page(
        out / "report.html",
        title="A language model learns to listen",
        claim="SmolLM2-135M writes down commands that it has never read, from speakers that it has "
        f"never heard, after {report['num_utterances']} utterances. The language model and "
        "Whisper's encoder stayed frozen.",
        tiles=[
            Tile(
                "Whole sentences right",
                percent("held_out_accuracy"),
                "new speakers, new sentences",
                report["held_out_accuracy"],
            ),
            Tile("Word error rate", percent("held_out_word_error_rate"), "the same utterances"),
            Tile(
                "The nearest utterance",
                percent("nearest_word_error_rate"),
                "word error rate of the baseline, which cannot make a new sentence",
            ),
            Tile(
                "Whisper tiny.en itself",
                percent("whisper_word_error_rate"),
                "word error rate with its own decoder, of 680,000 hours",
            ),
        ],
        sections=[
            ReportSection(
                "Who heard what",
                "Sentences that are right to the word, and words that are wrong.",
                table(["", "exact", "word error rate"], rows),
            ),
            ReportSection(
                "Listen",
                "Held-out utterances, what was said, and what the model wrote.",
                sheet_of(
                    (
                        Example(
                            f"{u.group}, {u.voice.name}",
                            text,
                            u.sentence,
                            words(text) == words(u.sentence),
                            audio=(u.path,),
                        )
                        for u, text in shown
                    ),
                    out / "data",
                ),
            ),
            ReportSection("Training", f"{report['num_steps']} steps.", loss_figure(losses)),
        ],
        facts={
            "Made of": {
                "language model": "SmolLM2-135M-Instruct, frozen",
                "encoder": "Whisper tiny.en's, frozen",
                "projector": "8 frames (0.16 s) joined into one token, closed form (frozen) + MLP",
                "speech": "eSpeak NG, in this process",
            },
            "Machine": report["machine"],
        },
    )


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


if __name__ == "__main__":
    run_command("listen", __doc__ or "", run, full=Size(), quick=QUICK)

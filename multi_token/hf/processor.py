"""The processor as transformers calls it: `apply_chat_template`, `processor(text=, images=)`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from multi_token.chat.format import ChatFormat
from multi_token.checkpoint.atomic import atomic_file
from multi_token.checkpoint.hub import local_folder
from multi_token.checkpoint.load import read_config, read_spec
from multi_token.checkpoint.save import CONFIG
from multi_token.collate import Collator
from multi_token.data.formats import to_conversation
from multi_token.errors import MultiTokenError, RowError
from multi_token.hf.inputs import TOKEN_TYPES, to_flat
from multi_token.hub import HubOptions, hub_options
from multi_token.media.fetch import Fetch
from multi_token.modalities.facts import joined, with_texts
from multi_token.processor import MultiTokenProcessor, processor_of
from multi_token.types import IGNORE_INDEX, Batch, Conversation, Sample

_OF_AUTO_CLASSES = ("config", "trust_remote_code", "adapter_kwargs", "use_fast")
"""Arguments that Auto classes and pipelines add, and that say nothing about a run."""
_NO_VARIABLES = (
    *("truncation", "max_length", "load_audio_from_video", "sanitize_control_tokens"),
    *("timeout", "return_metadata", "text_kwargs", "common_kwargs"),
)
"""Arguments of `apply_chat_template` that change nothing here: rows are never cut."""
_OPTIONS = {
    *("revision", "token", "cache_dir", "local_files_only", "language_model"),
    *("dtype", "device", "device_map", "attn_implementation", "quantization_config"),
}


class ChatProcessor(ProcessorMixin):
    """A run's processor: `AutoProcessor.from_pretrained(RUN)`.

    It returns flat tensors (`multi_token.hf.inputs`) and loads no weights. Its ids and media are
    those of training and of `multi-token ask`.
    """

    def __init__(self, run: MultiTokenProcessor, fields: Mapping[str, Any]) -> None:
        """`fields`: those of the run's config.json, with absolute paths."""
        self.run = run
        self.fields = dict(fields)
        self.tokenizer = run.tokenizer
        self.chat_template = run.chat.template

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        language_model: str | None = None,
        **options: Any,
    ) -> ChatProcessor:
        """Load the processor of a run; reads its config and the tokenizer.

        Args:
            pretrained_model_name_or_path: The run's folder or hub name.
            revision: Branch, tag or commit of a hub name.
            language_model: Path or hub name of the language model, if it has moved.
            **options: `token`, `cache_dir`, `local_files_only`.

        Returns:
            The processor.

        Raises:
            CheckpointError: If there is no run.
        """
        folder = pretrained_model_name_or_path
        found = of_a_run(options)
        names = ("token", "cache_dir", "local_files_only")
        hub = HubOptions(**{name: found[name] for name in names if name in found})
        with hub_options(hub):
            fields = read_config(folder, revision=revision)
            path = local_folder(folder, revision=revision, only=_SMALL)
            spec = read_spec(path, fields, language_model=language_model)
            run = processor_of(spec, hub=hub)
        return cls(run, {**fields, "model": spec.model_dump(mode="json")})

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "pt",
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        padding: bool | str = True,
        padding_side: Literal["left", "right"] | None = None,
        **others: Any,
    ) -> Any:
        """Render or tokenize one conversation, or a batch of them.

        Args:
            conversation: Messages with `role` and `content`, or a list of such lists. A content is
                a text, or a list of parts: texts, and media by the name of their modality
                (`{"type": "image", "image": "cat.png"}`). Nothing in a text is a slot.
            chat_template: Jinja text in place of the run's own.
            add_generation_prompt: End where the assistant's answer begins.
            continue_final_message: End within the last answer, which the model goes on with.
            return_assistant_tokens_mask: Add `assistant_masks` [batch, time], 1 at the tokens that
                training supervises.
            tokenize: Return ids; without, the text, with `<name>` in place of each item.
            return_tensors: `pt`.
            return_dict: Return all inputs of the model; without, the ids alone.
            processor_kwargs: `padding` and `padding_side`, as pipelines pass them.
            padding: Has no effect: a batch is always padded to its longest row, never cut.
            padding_side: Default: left for prompts, right for whole conversations.
            **others: Variables of the template, such as `enable_thinking`.

        Returns:
            A `BatchFeature` of `input_ids`, `attention_mask`, `mm_token_type_ids` and media
            tensors; or ids [batch, time]; or texts.

        Raises:
            RowError: For a conversation or an item that cannot be read.
            MultiTokenError: For an argument that a run does not have.
        """
        padding_side = (processor_kwargs or {}).get("padding_side", padding_side)
        variables = {name: value for name, value in others.items() if name not in _NO_VARIABLES}
        refused = [name for name in ("tools", "documents") if variables.pop(name, None)]
        if refused:
            raise MultiTokenError(f"a run takes no {' and '.join(refused)}; leave them out")
        is_batch = bool(conversation) and not isinstance(conversation[0], Mapping)
        several = list(conversation) if is_batch else [conversation]
        prompt_only = add_generation_prompt and not continue_final_message
        run = self.run
        if chat_template is not None:
            run = replace(run, chat=ChatFormat(self.tokenizer, chat_template))
        run = replace(run, chat=run.chat.with_kwargs(variables))
        found = [self._conversation(one, i, prompt_only) for i, one in enumerate(several)]
        if not tokenize:
            texts = [run.chat.render(one, prompt_only=prompt_only) for one in found]
            return texts if is_batch else texts[0]
        samples = []
        for one in found:
            sample = run(one, prompt_only=prompt_only)
            samples.append(_within_answer(run, sample) if continue_final_message else sample)
        if padding_side is None:
            padding_side = "left" if prompt_only or continue_final_message else "right"
        inputs = self._batch(samples, padding_side, return_tensors, return_assistant_tokens_mask)
        return inputs if return_dict else inputs["input_ids"]

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        *,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        padding_side: Literal["left", "right"] = "left",
        **media: Any,
    ) -> BatchFeature:
        """Tokenize rendered texts, with `<name>` where each item belongs.

        Args:
            images: Items of the modality `image`, or of the only one that takes images: for one
                text a list, for several a list for each.
            text: A text or a batch of texts, such as `apply_chat_template` returns. Special tokens
                in it count as such.
            videos: As `images`.
            audio: As `images`.
            return_tensors: `pt`.
            padding: Has no effect: a batch is always padded to its longest row, never cut.
            padding_side: Side of the padding.
            **media: Items of other modalities, by instance name.

        Returns:
            As `apply_chat_template`.

        Raises:
            RowError: If items and slots differ in number, or an item cannot be read.
        """
        given = {"image": images, "video": videos, "audio": audio}
        items = {self._modality_of(kind): v for kind, v in given.items() if v is not None} | media
        texts = [text] if isinstance(text, str) or text is None else list(text)
        samples = []
        for i, one in enumerate(texts):
            own = {name: _of_row(value, i, len(texts)) for name, value in items.items()}
            row = {f"{name}s": value for name, value in own.items() if value}
            row["messages"] = [{"role": "user", "content": one or ""}]
            conversation = to_conversation(row, self.run.modalities, row_id=f"[{i}]")
            prepared = [self.run.prepare(item, row_id=f"[{i}]") for item in conversation.media]
            runs = self.run.runs(conversation, prepared)
            sample = self.run.chat.tokenize_rendered(*with_texts(conversation, runs))
            sample.media, sample.media_spans = prepared, joined(sample.media_spans, runs)
            samples.append(sample)
        return self._batch(samples, padding_side, return_tensors)

    def prompts(self, conversations: Sequence[Any]) -> list[Sample]:
        """Return the samples of prompts, one for each conversation, up to its answer.

        Args:
            conversations: Lists of messages, as for `apply_chat_template`.

        Raises:
            RowError: For a conversation or an item that cannot be read.
        """
        return [
            self.run(self._conversation(one, i, prompt_only=True), prompt_only=True)
            for i, one in enumerate(conversations)
        ]

    def answers(self, generated: Tensor, inputs: Mapping[str, Any]) -> list[str]:
        """Return the texts of answers as `multi-token ask` prints them.

        Args:
            generated: Result of `generate`.
            inputs: The inputs that it was given.

        Returns:
            A text for each row, without prompt and special tokens.
        """
        new = generated[:, inputs["input_ids"].shape[1] :]
        return [self.run.chat.decode(ids).strip() for ids in new.tolist()]

    @property
    def model_input_names(self) -> list[str]:
        """Inputs without media, whose names depend on the modalities of a batch."""
        return ["input_ids", "attention_mask", TOKEN_TYPES]

    @classmethod
    def get_attributes(cls) -> list[str]:
        """None: the parts of a run are named by its config.json."""
        return []

    def __repr__(self) -> str:
        return f"ChatProcessor({', '.join(self.run.modalities) or 'text'})"

    def save_pretrained(
        self, save_directory: Any, push_to_hub: bool = False, **_: Any
    ) -> list[str]:  # type: ignore[override]
        """Write the config.json that describes the processor, unless the model's is there.

        Args:
            save_directory: Folder, made if it is missing.
            push_to_hub: Must be false: a run is uploaded by its model.

        Returns:
            The path of the config.
        """
        if push_to_hub:
            raise MultiTokenError(_PUSH_THE_MODEL)
        path = Path(save_directory) / CONFIG
        path.parent.mkdir(parents=True, exist_ok=True)
        # never the model's own: it also says what was trained
        if not path.exists():
            with atomic_file(path) as partial:
                partial.write_text(json.dumps(self.fields, indent=2) + "\n", encoding="utf-8")
        return [str(path)]

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Check that the run is at `repo_id`: `model.push_to_hub` uploads the processor too.

        Args:
            repo_id: Name on the hub.
            **options: `token` and `revision`; others change nothing.

        Returns:
            The address of the run.

        Raises:
            MultiTokenError: If there is no run.
        """
        from huggingface_hub import HfApi

        hub = HfApi(token=options.get("token"))
        if not hub.file_exists(repo_id, CONFIG, revision=options.get("revision")):
            raise MultiTokenError(_PUSH_THE_MODEL)
        return f"{hub.endpoint}/{repo_id}"

    def _conversation(self, messages: Any, index: int, prompt_only: bool) -> Conversation:
        row_id = f"[{index}]"
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise RowError(
                f"is {type(messages).__name__}, expected a list of messages",
                row_id=row_id,
                kind="format",
            )
        # a text is text alone, so that no user can write a slot
        parts = [
            {**m, "content": [{"type": "text", "text": m["content"]}]}
            if isinstance(m, Mapping) and isinstance(m.get("content"), str)
            else m
            for m in messages
        ]
        found = to_conversation({"messages": parts}, self.run.modalities, row_id=row_id)
        if not prompt_only and found.messages[-1].role != "assistant":
            raise RowError(
                "ends with a question; pass add_generation_prompt=True for the prompt of an answer",
                kind="no_target",
                row_id=row_id,
            )
        return found

    def _modality_of(self, kind: str) -> str:
        """Return the instance that takes a kind of media."""
        names = [
            name
            for name, modality in self.run.modalities.items()
            if kind in modality.openai_kinds or name == kind
        ]
        if kind in names:
            return kind
        if len(names) != 1:
            raise MultiTokenError(
                f"{len(names)} modalities of this run take {kind}s ({', '.join(names) or 'none'}); "
                f"pass the items by name, one of {', '.join(self.run.modalities)}"
            )
        return names[0]

    def _batch(
        self,
        samples: Sequence[Sample],
        padding_side: Literal["left", "right"],
        return_tensors: str | None,
        masks: bool = False,
    ) -> BatchFeature:
        if return_tensors not in ("pt", "auto", None):
            raise MultiTokenError(f"return_tensors is {return_tensors!r}, expected 'pt'")
        filler_id = self.run.chat.filler_id
        batch = Collator(self.run.modalities, filler_id, padding_side)(samples)
        data = to_flat(batch, self.run.modalities)
        if masks:
            data["assistant_masks"] = (batch["labels"] != IGNORE_INDEX).long()
        return BatchFeature(data)


@dataclass
class RowCollator:
    """A `data_collator` for rows of any accepted shape.

    Media are decoded here, so in the data workers of the trainer. Set `remove_unused_columns` of
    the trainer to false: it would remove the columns of the rows.
    """

    processor: ChatProcessor
    """Processor of the run."""
    root: str | None = None
    """Folder of relative media paths; default: the current one."""

    def __call__(self, rows: Sequence[Mapping[str, Any] | Conversation]) -> Batch:
        """Return the batch of rows, padded on the right. Raises RowError for a bad row."""
        run = replace(self.processor.run, fetch=Fetch(root=self.root))
        samples = [
            run(
                row
                if isinstance(row, Conversation)
                else to_conversation(row, run.modalities, row_id=f"row {i} of the batch")
            )
            for i, row in enumerate(rows)
        ]
        return Collator(run.modalities, run.chat.filler_id)(samples)


_SMALL = (CONFIG, "language_model/token*", "language_model/*.json*")
"""Files of a run on the hub that its processor needs."""
_PUSH_THE_MODEL = (
    "a processor is a part of its run, which is not there; `model.push_to_hub(...)` uploads both"
)


def of_a_run(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a `from_pretrained` without those that Auto classes add.

    Raises MultiTokenError for one that a run does not have.
    """
    found = {
        name: value
        for name, value in options.items()
        # many are passed on with a value that asks for nothing
        if value is not None and value is not False
        if name not in _OF_AUTO_CLASSES and not name.startswith("_")
    }
    unknown = sorted(found.keys() - _OPTIONS)
    if unknown:
        raise MultiTokenError(
            f"from_pretrained of a run does not know {', '.join(unknown)}; it has "
            f"{', '.join(sorted(_OPTIONS))}"
        )
    # Auto classes write this one option into the config that they read on the way
    attention = getattr(options.get("config"), "_attn_implementation", None)
    return found if attention is None else {"attn_implementation": attention, **found}


def _of_row(value: Any, index: int, num_rows: int) -> list[Any]:
    """Return the items of one text: all of them for a single text, else the list at its index."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if num_rows == 1:
        return items[0] if len(items) == 1 and isinstance(items[0], list) else items
    if len(items) != num_rows:
        raise MultiTokenError(
            f"{num_rows} texts and {len(items)} lists of media; give a list of items for each text"
        )
    own = items[index]
    return list(own) if isinstance(own, (list, tuple)) else [] if own is None else [own]


def _within_answer(run: MultiTokenProcessor, sample: Sample) -> Sample:
    """Cut a sample after the text of its last answer, before the end of the turn."""
    supervised = (sample.labels != IGNORE_INDEX).nonzero().flatten().tolist()
    ends = set(run.chat.end_of_turn_ids)
    while supervised and int(sample.input_ids[supervised[-1]]) in ends:
        supervised.pop()
    stop = supervised[-1] + 1
    return replace(sample, input_ids=sample.input_ids[:stop], labels=sample.labels[:stop])


class RunTokenizer:
    """`AutoTokenizer.from_pretrained(RUN)`: the language model's, with the template of the run."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *_: Any, **options: Any
    ) -> Any:
        """Return the tokenizer of a run; options as for `ChatProcessor`."""
        found = ChatProcessor.from_pretrained(pretrained_model_name_or_path, **options)
        found.tokenizer.chat_template = found.chat_template
        return found.tokenizer

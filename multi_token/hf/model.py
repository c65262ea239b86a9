"""The model as transformers calls it: flat inputs, `generate(**inputs)`, `labels`."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multi_token.checkpoint.atomic import atomic_file
from multi_token.checkpoint.references import relativize
from multi_token.checkpoint.save import CONFIG
from multi_token.convert.push import push, write_card
from multi_token.errors import LanguageModelError, MultiTokenError
from multi_token.generate import check_text_is_last, eos_token_ids
from multi_token.hf.inputs import TOKEN_TYPES, take_media
from multi_token.hf.processor import of_a_run
from multi_token.language_model.forward import (
    base_language_model,
    generate_from_embeds,
    per_layer_inputs,
)
from multi_token.model import MultiTokenForConditionalGeneration

MAX_NEW_TOKENS = 256
"""Longest answer if nothing names one, as for `multi-token ask`."""


class MultiTokenForMultimodalLM(MultiTokenForConditionalGeneration):
    """A run as a model of transformers: `AutoModelForMultimodalLM.from_pretrained(RUN)`.

    The language model stays the child that generates. Inputs are those of `ChatProcessor`, or a
    `Batch` of `RowCollator`.
    """

    output_modalities = ("text",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # soft caps and logit scales, which TRL reads there
        self.config.text_config = self.language_model.config
        self.run_folder: Path | None = None
        config = copy.deepcopy(self.language_model.generation_config)
        # greedy, as `multi-token ask`: chat models' own configs sample
        config.do_sample = False
        config.pad_token_id = self.require_processor().chat.filler_id
        config.eos_token_id = eos_token_ids(self)
        self.generation_config = config

    @classmethod
    def can_generate(cls) -> bool:
        """True: `generate` takes what transformers' takes."""
        return True

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Dtype of media inputs. The language model's is `model.language_model.dtype`."""
        return torch.float32

    @property
    def base_model(self) -> Callable[..., Any]:  # type: ignore[override]
        """The model up to its last hidden states, from flat inputs."""
        return self._hidden_states

    def get_output_embeddings(self) -> nn.Module:
        """The head of the language model."""
        return base_language_model(self.language_model).get_output_embeddings()

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
    ) -> Any:
        """Run the language model on ids and media.

        Args:
            input_ids: int64 [batch, time].
            attention_mask: int64 [batch, time].
            **inputs: Flat media inputs, `labels`, and arguments of the base class and of the
                language model.

        Returns:
            The language model's output, with `labels` its loss too.
        """
        if "media" not in inputs:
            inputs["media"] = self._take_media(inputs)
        inputs.pop(TOKEN_TYPES, None)
        return super().forward(input_ids, attention_mask, **inputs)

    def _take_media(self, inputs: dict[str, Any]) -> Any:
        return take_media(inputs, self.modalities, inputs.pop(TOKEN_TYPES, None))

    def _hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
    ) -> Any:
        media = inputs.pop("media") if "media" in inputs else self._take_media(inputs)
        for of_the_loss in ("shift_labels", "supervised", "counts"):
            inputs.pop(of_the_loss, None)
        return base_language_model(self.language_model).base_model(
            inputs_embeds=self.embed(input_ids, media),
            attention_mask=attention_mask,
            **per_layer_inputs(self.language_model, input_ids),
            **inputs,
        )

    @torch.no_grad()
    def generate(self, inputs: Any = None, **options: Any) -> Any:  # type: ignore[override]
        """Generate after the prompts of a processor, or answer conversations.

        Args:
            inputs: Ids, if not given as `input_ids`; or conversations, as for the base class.
            **options: What `ChatProcessor.apply_chat_template` returned, `generation_config`, and
                all options of transformers' `generate`.

        Returns:
            Ids int64 [batch, prompt + new], or with `return_dict_in_generate` the output of
            transformers. Positions of media hold the filler id. For conversations: texts.

        Raises:
            SpliceError: If media tensors and `mm_token_type_ids` disagree.
            LanguageModelError: For an option that this language model cannot have.
        """
        if inputs is not None and not isinstance(inputs, Tensor):
            return super().generate(inputs, **options)
        input_ids: Tensor | None = options.pop("input_ids", inputs)
        if input_ids is None:
            raise MultiTokenError(
                "generate got no input_ids; pass what the processor returned: generate(**inputs)"
            )
        attention_mask = options.pop("attention_mask", None)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        media: Any = self._take_media(options)
        if self.capabilities.prefill_mode == "ids":
            check_text_is_last(self, {"input_ids": input_ids, "media": media})  # type: ignore[arg-type]
        options = self._merged(options)
        embeds = self.embed(input_ids, media)
        groups = self._groups(attention_mask, options)
        outputs = [
            self._generate_group(input_ids[rows], embeds[rows], attention_mask[rows], options)
            if len(groups) == 1
            else self._generate_group(
                input_ids[rows, start:], embeds[rows, start:], attention_mask[rows, start:], options
            )
            for rows, start in groups
        ]
        if len(groups) == 1:
            found = outputs[0]
            is_tensor = isinstance(found, Tensor)
            joined = _after(input_ids, found if is_tensor else found.sequences)
            if is_tensor:
                return joined
            found.sequences = joined
            return found
        longest = max(new.shape[1] for new in outputs)
        copies = len(outputs[0]) // len(groups[0][0])
        new_ids = input_ids.new_full(
            (len(input_ids) * copies, longest), int(options["pad_token_id"])
        ).view(len(input_ids), copies, longest)
        for (rows, _), new in zip(groups, outputs, strict=True):
            new_ids[rows, :, : new.shape[1]] = new.view(len(rows), copies, -1)
        return _after(input_ids, new_ids.flatten(0, 1))

    def _merged(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options of one call over `generation_config` over the model's own."""
        given = options.pop("generation_config", None)
        merged: dict[str, Any] = {}
        for config in (self.generation_config, given):
            if config is not None:
                merged |= config.to_diff_dict()
        merged.pop("transformers_version", None)
        merged |= options
        for name in ("pad_token_id", "eos_token_id"):
            if merged.get(name) is None:
                merged[name] = getattr(self.generation_config, name)
        if merged.get("max_new_tokens") is None and merged.get("max_length") is None:
            merged["max_new_tokens"] = MAX_NEW_TOKENS
        if not merged.get("do_sample"):
            # explicit, since transformers takes what is not given from the child's own config
            merged |= {"do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k"))}
        return merged

    def _groups(
        self, attention_mask: Tensor, options: dict[str, Any]
    ) -> list[tuple[list[int], int]]:
        """Rows to generate together and the first position of their prompts: mostly all rows."""
        batch, time = attention_mask.shape
        longest = time + int(options.get("max_new_tokens") or 0)
        if batch == 1 or self.capabilities.can_batch_lengths(
            max(longest, options.get("max_length") or 0)
        ):
            return [(list(range(batch)), 0)]
        by_start: dict[int, list[int]] = {}
        for row, length in enumerate(attention_mask.sum(1).tolist()):
            by_start.setdefault(time - length, []).append(row)
        if len(by_start) > 1 and options.get("return_dict_in_generate"):
            raise LanguageModelError(
                f"{self.capabilities.name} cannot batch prompts of different lengths, so "
                "return_dict_in_generate needs prompts of one length; generate them one by one"
            )
        return [(rows, start) for start, rows in by_start.items()]

    def _generate_group(
        self, input_ids: Tensor, embeds: Tensor, attention_mask: Tensor, options: dict[str, Any]
    ) -> Any:
        options = dict(options)
        mode = self.capabilities.prefill_mode
        if options.get("streamer") is not None:
            options["streamer"] = _PromptFirst(options["streamer"], input_ids)
        if mode == "embeds":
            # the child sees the new ids alone
            for name in ("logits_processor", "stopping_criteria"):
                if options.get(name):
                    options[name] = [_SeesPrompt(one, input_ids) for one in options[name]]
            allowed = options.get("prefix_allowed_tokens_fn")
            if allowed is not None:
                options["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                    row, torch.cat([input_ids[row], ids])
                )
        return generate_from_embeds(
            self.language_model,
            inputs_embeds=embeds,
            input_ids=input_ids,
            attention_mask=attention_mask,
            prefill_mode=mode,
            **options,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *_: Any, **options: Any
    ) -> MultiTokenForMultimodalLM:
        """Load a run, by the arguments of transformers.

        Args:
            pretrained_model_name_or_path: The run's folder or hub name.
            **options: `dtype`, `device_map`, `attn_implementation`, `quantization_config`,
                `revision`, `token`, `cache_dir`, `local_files_only`, and those of the base class.

        Returns:
            The model in eval mode; on the CPU, unless `device_map` or `device` says otherwise.

        Raises:
            CheckpointError: If there is no complete run.
            MultiTokenError: For an option that a run does not have.
        """
        options = of_a_run(options)
        model = super().from_pretrained(pretrained_model_name_or_path, **options)
        folder = Path(pretrained_model_name_or_path)
        model.run_folder = folder if folder.is_dir() else None
        return model

    def save_pretrained(
        self, save_directory: Any, push_to_hub: bool = False, **options: Any
    ) -> None:  # type: ignore[override]
        """Write the run: trained tensors, references, parts inside the run, recipe and card.

        Args:
            save_directory: Folder, made if it is missing.
            push_to_hub: Upload it too; `options` are then those of `push_to_hub`, with `repo_id`.
            **options: Other arguments of transformers change nothing.
        """
        folder = Path(save_directory)
        name = options.pop("repo_id", None) or folder.absolute().name
        super().save_pretrained(folder)
        if self.run_folder is not None:
            _copy_parts(self.run_folder, folder)
        write_card(folder, name)
        if push_to_hub:
            known = ("private", "revision", "token", "commit_message", "create_pr")
            push(folder, name, **{key: options[key] for key in known if key in options})

    def push_to_hub(self, repo_id: str, **options: Any) -> None:  # type: ignore[override]
        """Upload the run as `multi-token push` does, with its card and its refusals.

        Args:
            repo_id: Name on the hub, such as `user/run`.
            **options: `private`, `revision`, `token`, `commit_message`, `create_pr`.

        Raises:
            ConvertError: If the run names folders of this machine, or the upload fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **options)


def _after(input_ids: Tensor, new_ids: Tensor) -> Tensor:
    """Prompts [batch, time] and new ids [batch * copies, new] -> [batch * copies, time + new]."""
    prompts = input_ids.repeat_interleave(len(new_ids) // len(input_ids), dim=0)
    return torch.cat([prompts, new_ids.to(prompts.device)], dim=1)


class _SeesPrompt:
    """A logits processor or stopping criterion that gets the ids of the prompt too."""

    def __init__(self, inner: Callable[..., Any], input_ids: Tensor) -> None:
        self.inner = inner
        self.input_ids = input_ids

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self.inner(_after(self.input_ids, input_ids), scores)


class _PromptFirst:
    """A streamer that gets the prompt's ids first, where the child has embeddings alone."""

    def __init__(self, streamer: Any, input_ids: Tensor) -> None:
        self.streamer = streamer
        self.prompt: Tensor | None = input_ids.cpu()

    def put(self, ids: Tensor) -> None:
        prompt, self.prompt = self.prompt, None
        self.streamer.put(ids if prompt is None else prompt)

    def end(self) -> None:
        self.streamer.end()


def _copy_parts(run: Path, folder: Path) -> None:
    """Copy what a saved model refers to in the run it was loaded from, and the run's recipe."""
    if run.absolute() == folder.absolute():
        return
    if (run / "recipe.yaml").is_file():
        shutil.copyfile(run / "recipe.yaml", folder / "recipe.yaml")
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    within = relativize(fields["model"], run)
    if within == fields["model"]:
        return
    for name in _names(within):
        if name.startswith("./"):
            shutil.copytree(run / name, folder / name, dirs_exist_ok=True)
    with atomic_file(folder / CONFIG) as partial:
        partial.write_text(json.dumps({**fields, "model": within}, indent=2) + "\n")


def _names(section: dict[str, Any]) -> list[str]:
    encoders = [fields.get("encoder") for fields in section["modalities"].values()]
    return [str(name) for name in (section["language_model"], *encoders)]

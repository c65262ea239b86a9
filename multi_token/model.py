"""The model: encoders and projectors beside an untouched language model.

Below `Batch` there are tensors only. Paths, texts and templates occur in the methods `from_spec`,
`from_pretrained`, `save_pretrained` and `generate` alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Self

from multi_token.checkpoint.hub import local_folder
from multi_token.checkpoint.language_model_folder import LANGUAGE_MODEL
from multi_token.checkpoint.load import load_trained, read_config, read_spec
from multi_token.checkpoint.save import MODEL_TYPE, save, untrained_fields
from multi_token.collate import FEATURES_KEY, NEWLINES_KEY, supervised_positions
from multi_token.encoders import (
    TrainedEncoderState,
    build_encoders,
    is_randomly_initialized,
    set_train_mode,
)
from multi_token.errors import MultiTokenError
from multi_token.generate import generate
from multi_token.hub import DEFAULT_HUB, HubOptions, hub_options
from multi_token.language_model.capabilities import Capabilities
from multi_token.language_model.embeddings_only import load_embeddings
from multi_token.language_model.forward import (
    ScaledEmbedding,
    filter_flash_attention_kwargs,
    per_layer_inputs,
)
from multi_token.language_model.loading import DeviceMap, load_language_model
from multi_token.language_model.loss import (
    TokenFunction,
    chunk_rows,
    supervised_loss,
    supervised_output,
)
from multi_token.language_model.probe import probe
from multi_token.language_model.quantization import QuantizationConfig, split_quantization
from multi_token.language_model.segment_attention import segments_to_mask
from multi_token.modalities.base import Encoder, Modality
from multi_token.processor import MultiTokenProcessor, processor_of
from multi_token.projectors.base import EmbedCount, Projector
from multi_token.recipe.model import ModelSpec
from multi_token.recipe.train import LOGITS_MEGABYTES
from multi_token.splice import MediaEmbeds, splice
from multi_token.types import BatchCounts, Features, MediaBatch

_Module = TypeVar("_Module", bound=nn.Module)


class MultiTokenConfig(PreTrainedConfig):
    """Fields of a checkpoint's config.json.

    Args:
        identity: Fingerprint of the language model (checkpoint/fingerprint.py).
        base_identity: Fingerprint before training, if all of the language model was trained.
        base_model: Hub name of the language model that one inside the run was made from.
        combined_from: Runs that the modalities come from (convert/combine.py).
    """

    model_type = MODEL_TYPE
    identity: dict[str, Any] | None = None
    base_identity: dict[str, Any] | None = None
    base_model: str | None = None
    combined_from: list[dict[str, Any]] | None = None


class MultiTokenForConditionalGeneration(PreTrainedModel):
    """Encoders and projectors beside an `AutoModelForCausalLM`: encode, project, splice, forward.

    The language model keeps its own class and weights. Media features are projected to its
    embedding width and written into `inputs_embeds` at the media spans (as in LLaVA, Liu et al.,
    arXiv:2304.08485). `from_spec` and `from_pretrained` build the model with its processor.

    Args:
        config: Fields of the checkpoint's config.json.
        language_model: A decoder-only model of transformers, with or without a PEFT adapter.
        modalities: Instance name -> modality.
        encoders: Instance name -> encoder; all are frozen.
        projectors: Instance name -> projector to the language model's embedding width.
        processor: Turns conversations into samples; None for a model that gets batches alone.
    """

    config_class = MultiTokenConfig
    base_model_prefix = "multi_token"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # without it gradient accumulation would multiply the loss
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: MultiTokenConfig,
        language_model: Any,
        modalities: Mapping[str, Modality],
        encoders: Mapping[str, Encoder],
        projectors: Mapping[str, nn.Module],
        processor: MultiTokenProcessor | None = None,
    ) -> None:
        super().__init__(config)
        self.language_model = language_model
        self.encoders = nn.ModuleDict(encoders).requires_grad_(False)
        self.projectors = nn.ModuleDict(projectors)
        self.trained_encoders = {
            name: TrainedEncoderState(tensors="all")
            for name, encoder in encoders.items()
            if is_randomly_initialized(encoder)
        }
        self.trained_language_model = False
        self.modalities = dict(modalities)
        self.processor = processor
        # where not all logits are asked for: see `forward`
        self.logits_bytes = LOGITS_MEGABYTES * 2**20
        self._capabilities: Capabilities | None = None
        self._count_checks: list[tuple[str, Tensor]] | None = None
        # transformers' constructor leaves the training mode on
        self.train(False)

    def train(self, mode: bool = True) -> MultiTokenForConditionalGeneration:
        """Set the training mode; frozen parts of encoders stay in eval mode.

        Args:
            mode: True for training, False for evaluation.
        """
        super().train(mode)
        # the trainer calls this before each step, so frozen dropout and batch norms are set here
        self.encoders.eval()
        for name in self.encoders:
            set_train_mode(self.encoder(name), mode)
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Device of inputs. Layers of a language model that is to be sharded are on the host."""
        weight = self.language_model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight.device

    @property
    def capabilities(self) -> Capabilities:
        """Capabilities of the language model, probed on first use and then cached.

        Raises:
            LanguageModelError: If the language model cannot run from embeddings at all.
        """
        if self._capabilities is None:
            self._capabilities = probe(self.language_model)
        return self._capabilities

    @capabilities.setter
    def capabilities(self, found: Capabilities) -> None:
        """Set capabilities of a language model whose layers are not loaded here."""
        self._capabilities = found

    def get_input_embeddings(self) -> nn.Module:
        """The module from ids [..., time] to embeddings [..., time, dim], in the model's scale."""
        embedding = self.language_model.get_input_embeddings()
        scale = self.capabilities.embedding_scale
        return embedding if scale == 1.0 else ScaledEmbedding(embedding, scale)

    def encode(self, name: str, inputs: Mapping[str, Tensor]) -> Features:
        """Encode all items of one modality; without gradients, unless the encoder is trained.

        Args:
            name: Instance name.
            inputs: Inputs of its encoder, batch axis first, or cached features.

        Returns:
            Features [items, length, dim].
        """
        if FEATURES_KEY in inputs:
            return Features(inputs[FEATURES_KEY], inputs["mask"], inputs.get(NEWLINES_KEY))
        # frozen encoders keep no activations, even when gradients are on for the projector
        encoder = self.encoder(name)
        trained = any(p.requires_grad for p in encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return encoder(**inputs)

    def embed(self, input_ids: Tensor, media: Mapping[str, MediaBatch] | None = None) -> Tensor:
        """Embed ids and media.

        Args:
            input_ids: int64 [batch, time]; ids at media spans are fillers.
            media: Modality name -> its items and their positions.

        Returns:
            inputs_embeds [batch, time, dim].

        Raises:
            SpliceError: If media embeddings and positions disagree in number or width.
        """
        embeds = self.get_input_embeddings()(input_ids)
        media = media or {}
        pieces = [
            MediaEmbeds(name, self._media_embeds(name, m), m["positions"])
            for name, m in media.items()
        ]
        # before the splice, where a sum of zero changes no media embedding
        if self.training:
            embeds = embeds + self._touch_absent(media).to(embeds.dtype)
        return splice(embeds, pieces)

    @contextmanager
    def count_checks_deferred(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Within, the counts of media embeddings are checked by the caller, without a host sync.

        Yields a list of (modality, bool []) to which each forward adds the masked modalities of its
        batch: True on the device if embeddings and positions disagree in number.
        """
        checks: list[tuple[str, Tensor]] = []
        self._count_checks = checks
        try:
            yield checks
        finally:
            self._count_checks = None

    def _media_embeds(self, name: str, media: MediaBatch) -> Tensor:
        """All tokens of a modality's items [copies * num_tokens, dim], computed once."""
        features, copies = self.encode(name, media["inputs"]), media.get("copies", 1)
        if self._count_checks is None:
            tokens = self.projectors[name](features)
        else:
            count = EmbedCount(len(media["positions"]) // copies)
            tokens = self.projectors[name](features, count)
            if count.is_wrong is not None:
                self._count_checks.append((name, count.is_wrong))
        return tokens if copies == 1 else tokens.repeat(copies, 1)

    def _touch_absent(self, media: Mapping[str, MediaBatch]) -> Tensor:
        """A zero that depends on every trainable parameter of the modalities that are absent."""
        # DDP's all-reduce waits for a gradient of each parameter on every rank, so a rank whose
        # rows lack a modality would hang the others
        zero = torch.zeros((), device=self.device)
        for name, projector in self.projectors.items():
            if name not in media:
                for parameter in (*projector.parameters(), *self.encoders[name].parameters()):
                    if parameter.requires_grad:
                        zero = zero + 0.0 * parameter.sum()
        return zero

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        supervised: Tensor | None = None,
        counts: BatchCounts | None = None,
        media: Mapping[str, MediaBatch] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        returns: Literal["loss", "logits"] | TokenFunction | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the language model on ids and media.

        Args:
            input_ids: int64 [batch, time].
            attention_mask: int64 [batch, time]; None for a packed row.
            labels: int64 [batch, time], `IGNORE_INDEX` where not supervised.
            shift_labels: int64 [batch, time], the id to predict at each position.
            supervised: int64 [num_supervised], as in `Batch`. Without it the host waits for the
                device to count them.
            counts: Numbers of the batch, by which a packed row is attended to in segments.
            media: Modality name -> its items and their positions.
            num_items_in_batch: Supervised positions over all devices and accumulation steps, by
                which the summed loss is divided.
            returns: The one field of a `SupervisedOutput` to compute, or the function of its
                `per_token`. Logits then take no more than `logits_bytes` at a time, in float32.
            **kwargs: Passed to the language model, such as the positions of a `PackedBatch`.

        Returns:
            With `shift_labels`, loss and logits [num_supervised, vocabulary], or, with `returns`, a
            `SupervisedOutput`. Without, the language model's own output: logits [batch, time,
            vocabulary], and with `labels` its loss.
        """
        kwargs = filter_flash_attention_kwargs(self.language_model, kwargs)
        if counts is not None and counts.segments:
            attention_mask = segments_to_mask(
                self.language_model, counts, lambda: self.capabilities.segment_reach
            )
        embeds = self.embed(input_ids, media)
        kwargs |= per_layer_inputs(self.language_model, input_ids)
        if shift_labels is None:
            if labels is not None:
                kwargs |= {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return self.language_model(
                inputs_embeds=embeds, attention_mask=attention_mask, **kwargs
            )
        kwargs |= {
            "inputs_embeds": embeds,
            "attention_mask": attention_mask,
            "shift_labels": shift_labels,
            "supervised": supervised_positions(shift_labels) if supervised is None else supervised,
            "num_items_in_batch": num_items_in_batch,
            "supports_logits_to_keep": self.capabilities.supports_logits_to_keep,
        }
        if returns is None:
            return supervised_loss(self.language_model, **kwargs)
        rows = None
        if self.capabilities.supports_chunked_logits:
            rows = chunk_rows(self.language_model, self.logits_bytes)
        return supervised_output(self.language_model, chunk_rows=rows, returns=returns, **kwargs)

    def generate(self, conversations: Sequence[Any], **options: Any) -> list[str]:  # type: ignore[override]
        """Generate the assistant's answer to each conversation, greedily by default.

        Args:
            conversations: `Conversation` objects, or rows of any accepted shape. A last assistant
                turn is left out.
            **options: `max_new_tokens` (default 128), `batch_size` (default 8), `root` (folder of
                relative media paths), `streamer`, `on_batch`; all others go to the language
                model's `generate`.

        Returns:
            Texts without special tokens, in the order of `conversations`.

        Raises:
            RowError: If a row cannot be read, before its batch is generated.
            MultiTokenError: If the model has no processor.
        """
        return generate(self, conversations, **options)

    def require_processor(self) -> MultiTokenProcessor:
        """The processor, without a limit on the length of a prompt.

        Raises:
            MultiTokenError: If the model was built without one.
        """
        if self.processor is None:
            raise MultiTokenError("this model has no processor; load it with from_pretrained(RUN)")
        return replace(self.processor, max_tokens=None)

    def encoder(self, name: str) -> Encoder:
        """The encoder of a modality, typed."""
        module = self.encoders[name]
        assert isinstance(module, Encoder)
        return module

    def projector(self, name: str) -> Projector:
        """The projector of a modality, typed."""
        module = self.projectors[name]
        assert isinstance(module, Projector)
        return module

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:  # type: ignore[override]
        """Write trained tensors, and references with fingerprints to all other parts.

        Args:
            save_directory: Folder of the checkpoint, made if it is missing.
        """
        save(self, save_directory)

    @classmethod
    def from_spec(
        cls,
        spec: ModelSpec,
        *,
        max_tokens: int | None = None,
        embeddings_only: bool = False,
        device_map: DeviceMap | None = None,
        quantization_config: QuantizationConfig | None = None,
        hub: HubOptions = DEFAULT_HUB,
    ) -> Self:
        """The model of a recipe before training: frozen parts loaded, projectors initialized.

        Args:
            spec: The `model` section of a recipe.
            max_tokens: Limit of a conversation's length for the processor; None: no limit.
            embeddings_only: Load the input embeddings of the language model and none of its layers,
                for a gateway before an external engine.
            device_map: Devices of the language model's parts, as accelerate takes them: `auto`, or
                module -> device. Such a model generates, and cannot be trained.
            quantization_config: A config of transformers in place of `spec.quantization`.
            hub: Options of all downloads.

        Returns:
            The model with its processor, on the CPU, in eval mode. With a device map, encoders and
            projectors are on the device of the input embeddings.

        Raises:
            LanguageModelError: If the language model cannot be loaded.
        """
        # a gateway needs ids -> embeddings only, and the layers may not fit its machine
        load_child = load_embeddings if embeddings_only else load_language_model
        with hub_options(hub):
            child: Any = load_child(
                spec.language_model,
                revision=spec.revision,
                dtype=spec.dtype,
                attn_implementation=spec.attn_implementation,
                quantization=quantization_config or spec.quantization,
                **({} if device_map is None else {"device_map": device_map}),
            )
            encoders = build_encoders(spec.modalities)
            processor = processor_of(spec, max_tokens=max_tokens, hub=hub)
        # from the weights, since configs name the embedding width differently
        width = int(child.get_input_embeddings().weight.shape[1])
        projectors = {
            name: modality.projector.build(encoders[name].dim, width)
            for name, modality in spec.modalities.items()
        }
        config = MultiTokenConfig(**untrained_fields(spec, child, processor.chat))
        model = cls(config, child, spec.modalities, encoders, projectors, processor)
        if device_map is not None:
            beside = child.get_input_embeddings().weight.device
            model.encoders.to(beside)
            model.projectors.to(beside)
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        language_model: str | None = None,
        device: str | None = None,
        device_map: DeviceMap | None = None,
        embeddings_only: bool = False,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        quantization_config: QuantizationConfig | None = None,
        **hub: Any,
    ) -> Self:
        """Load a trained run.

        Args:
            folder: The run's folder or hub name (`user/run@revision` names a revision too).
            revision: Branch, tag or commit of a hub name.
            language_model: Path or hub name of the frozen language model, if it has moved.
            device: Device of the model; default: the CPU.
            device_map: As for `from_spec`, in place of `device`.
            embeddings_only: As for `from_spec`.
            dtype: Precision of the language model; default, and `auto`: as the run names it.
            attn_implementation: Attention of the language model; default: as the run names it.
            quantization_config: `4bit`, `8bit`, `int8`, fields of a recipe's `quantization`, or a
                config of transformers; default: as the run names it.
            **hub: `token`, `cache_dir`, `local_files_only`: see `HubOptions`.

        Returns:
            The model with its processor, in eval mode.

        Raises:
            CheckpointError: If the folder is not a checkpoint of multi_token, is incomplete, or
                belongs to another language model.
            MultiTokenError: If both `device` and `device_map` are given.
        """
        if device and device_map is not None:
            raise MultiTokenError("`device` and `device_map` exclude each other; leave one out")
        options = HubOptions(**hub)
        with hub_options(options):
            fields = read_config(folder, revision=revision)
            path = local_folder(folder, revision=revision)
        if device_map is not None and fields.get("base_identity"):
            # its trained weights at once: they cannot be copied into layers that are not in memory
            language_model = str((path / LANGUAGE_MODEL).absolute())
        own, others = split_quantization(quantization_config)
        spec = read_spec(
            path,
            fields,
            language_model=language_model,
            # `auto` is the precision that the checkpoint names, as for transformers
            dtype=None if dtype == "auto" else dtype and str(dtype).removeprefix("torch."),
            attn_implementation=attn_implementation,
            quantization=own,
        )
        model = cls.from_spec(
            spec,
            embeddings_only=embeddings_only,
            device_map=device_map,
            quantization_config=others,
            hub=options,
        )
        model.config.base_model = fields.get("base_model")
        model.config.combined_from = fields.get("combined_from")
        load_trained(model, path, fields)
        if fields.get("base_identity"):
            model.trained_language_model = True
            model.config.base_identity = fields["base_identity"]
        return (move_to_device(model, device) if device else model).eval()


def move_to_device(model: _Module, device: Any) -> _Module:
    """The model on a device."""
    nn.Module.to(model, device)  # transformers' own hides its arguments from type checkers
    return model

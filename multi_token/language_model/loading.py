"""The language model as it comes: loading it, whatever its form, and LoRA on it.

Border: the only home of language-model quirks. The model stays an untouched child; nothing here
subclasses or patches it. How it is driven by embeddings stands in forward.py, what it can do is
found
by language_model/probe.py.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from multi_token.errors import LanguageModelError
from multi_token.language_model.quantization import (
    keep_backward_layout,
    quantization_config,
    quantized_parameters,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from multi_token.recipe.recipe import Quantization
    from multi_token.recipe.train import AdapterSpec

# what a file that is cut off, foreign or needs another package is answered with
_FAULTS = (
    ImportError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SafetensorError,
    ValueError,
    struct.error,
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a hub name, a folder or a GGUF file. Raises LanguageModelError."""
    from transformers import AutoTokenizer

    source, options = _gguf_arguments(name)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, **options)
    except _FAULTS as error:
        raise LanguageModelError(
            f"no tokenizer could be loaded from {name!r} (a hub name, a folder or a GGUF file is "
            f"expected): {first_line(error)}"
        ) from None


def load_language_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """A decoder-only model of transformers, frozen and in eval mode. Raises LanguageModelError.

    `name`: a hub name, a folder, a GGUF file, or a folder that holds one GGUF file and no other
    weights. Whether the model can be driven by embeddings is found where it runs: see probe.py.
    """
    from transformers import AutoModelForCausalLM

    source, options = _gguf_arguments(name)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        _check_not_quantized(name, source, options, revision)
        options["quantization_config"] = quantization_config(quantization, dtype=dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            **options,
        )
    except _FAULTS as error:
        raise LanguageModelError(
            f"no language model could be loaded from {name!r} (a hub name, a folder or a GGUF file "
            f"of a decoder-only model is expected): {first_line(error)}"
        ) from None
    if "gguf_file" in options:
        _clear_gguf_quantizer(model)
    if quantization is not None and not quantized_parameters(model):
        raise LanguageModelError(
            f"no weight of {name!r} ({type(model).__name__}) could be quantized to "
            f"{quantization.kind}: its layers are not torch's linear ones; set model.quantization "
            "to null, or try another kind"
        )
    keep_backward_layout(model)
    return model.requires_grad_(False).eval()


class EmbeddingsOnly(nn.Module):
    """Of a language model what looks ids up, and nothing that answers.

    For a gateway whose language model runs elsewhere: prompts are made of this, and the layers
    need no memory.
    """

    embeddings_only = True
    name_or_path = ""

    def __init__(self, embedding: nn.Module, config: Any, generation_config: Any) -> None:
        super().__init__()
        self.embedding = embedding
        self.config = config
        self.generation_config = generation_config

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, *_: Any, **__: Any) -> Any:
        raise LanguageModelError(
            "only the embeddings of this language model were loaded, so it cannot answer here"
        )


def load_embeddings(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
) -> EmbeddingsOnly:
    """What `load_language_model` loads, without its layers. Raises LanguageModelError.

    transformers is asked for a model of no layers, so that of the files only embeddings and head
    are read. Where a family cannot be made so, or its embeddings do not come, all of it is loaded
    and the rest given up again.
    """
    less = _load_without_layers(name, revision, dtype) if quantization is None else None
    if less is None:
        whole: Any = load_language_model(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization=quantization,
        )
        less = (whole, whole.config)
    model, config = less
    found = EmbeddingsOnly(model.get_input_embeddings(), config, model.generation_config)
    return found.requires_grad_(False).eval()


def _load_without_layers(name: str, revision: str | None, dtype: str) -> tuple[Any, Any] | None:
    """A model of no layers and the config of the whole one, or None if there is no such thing."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if _gguf_arguments(name)[1]:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # of every layer it would say that it is left over
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        fewer = copy.deepcopy(config)
        text = fewer.get_text_config()
        for field in ("layer_types", "mlp_layer_types"):
            if getattr(text, field, None) is not None:
                setattr(text, field, [])
        text.num_hidden_layers = 0
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            config=fewer,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
        )
    except (*_FAULTS, AttributeError, IndexError, TypeError, ZeroDivisionError):
        return None
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    return None if report["missing_keys"] or report["mismatched_keys"] else (model, config)


def _gguf_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """What transformers is asked for: the name, or a GGUF file's folder and the file's name."""
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LanguageModelError(f"expected a GGUF file, found nothing at {path.absolute()}")
        file = path
    else:
        files = sorted(path.glob("*.gguf")) if path.is_dir() else []
        if not files or any(any(path.glob(pattern)) for pattern in _WEIGHTS):
            return name, {}
        if len(files) > 1:
            raise LanguageModelError(
                f"{name} holds {len(files)} GGUF files and no other weights; set "
                f"model.language_model to one of them: {', '.join(f.name for f in files)}"
            )
        (file,) = files
    if find_spec("gguf") is None:
        raise LanguageModelError(
            f"reading {file.name} needs the package gguf, which is not installed; install it with: "
            'pip install "multi_token[gguf]"'
        )
    return str(file.parent), {"gguf_file": file.name}


def _clear_gguf_quantizer(model: Any) -> None:
    """Its weights are plain numbers by now, but it would be refused as quantized where it goes."""
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config


def _check_not_quantized(
    name: str, source: str, options: Mapping[str, Any], revision: str | None
) -> None:
    if "gguf_file" in options:
        raise LanguageModelError(
            f"model.quantization cannot be used with the GGUF file of {name!r}, which is opened to "
            "full precision; set it to null, or name a folder with safetensors"
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError):
        return  # loading says it better
    own = getattr(config, "quantization_config", None)
    if own is not None:
        fields = own if isinstance(own, dict) else own.to_dict()
        raise LanguageModelError(
            f"{name} is quantized already ({fields.get('quant_method')}), so model.quantization "
            "cannot be applied on top; set it to null to use the weights as they are"
        )


def first_line(error: Exception) -> str:
    """An error of another library as one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@torch.no_grad()
def embedding_rms(model: Any) -> float:
    """Root mean square of the input embeddings, as the embedding module returns them.

    Through the module rather than its weight: some families scale inside it. `model`: a language
    model, or ours with one inside.
    """
    embed = model.get_input_embeddings()
    num_ids = int(embed.weight.shape[0])
    ids = torch.arange(0, num_ids, max(1, num_ids // 4096), device=embed.weight.device)
    return float(embed(ids).float().square().mean().sqrt())


def attach_adapter(language_model: PreTrainedModel, spec: AdapterSpec) -> Any:
    """LoRA on this model alone (PEFT). Its weights are float32 whatever the base's precision.

    Raises LanguageModelError for layers that do not take it.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=spec.target_modules,
        use_dora=spec.use_dora,
        use_rslora=spec.use_rslora,
    )
    try:
        return get_peft_model(language_model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        _remove_partial_adapter(language_model)
        raise LanguageModelError(
            f"LoRA cannot be attached to {spec.target_modules}: "
            f"{first_line(error).partition('. ')[0]}; set train.adapter.target_modules to a list "
            f"of layers that take it: {', '.join(_lora_target_modules(language_model))}"
        ) from None


def _lora_target_modules(language_model: PreTrainedModel) -> list[str]:
    """Names of linear layers, each tried alone, without the head."""
    from peft import LoraConfig, get_peft_model

    head = language_model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    fitting = []
    for name in sorted(names):
        try:
            get_peft_model(language_model, LoraConfig(r=1, target_modules=[name]))
        except ValueError:
            continue
        finally:
            _remove_partial_adapter(language_model)
        fitting.append(name)
    return fitting


def _remove_partial_adapter(language_model: nn.Module) -> None:
    """Put layers back that PEFT has wrapped, as it does before it refuses the next one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(language_model.named_modules()):
        if isinstance(module, BaseTunerLayer) and name:
            language_model.set_submodule(name, module.get_base_layer())
    if hasattr(language_model, "peft_config"):
        del language_model.peft_config


def adapter_parameters(language_model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The LoRA parameters, or nothing if none is attached."""
    return [p for name, p in language_model.named_parameters() if "lora_" in name]

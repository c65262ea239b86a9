"""LoRA on a language model, with PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from multi_token.errors import LanguageModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from multi_token.recipe.train import AdapterSpec


def attach_adapter(language_model: PreTrainedModel, spec: AdapterSpec) -> Any:
    """Attach LoRA to a language model; its weights are float32 in any base precision.

    Args:
        language_model: A causal language model, which PEFT modifies in place.
        spec: Rank, scale, dropout and target layers; DoRA and rsLoRA are options.

    Returns:
        PEFT's wrapper of the model.

    Raises:
        LanguageModelError: For target layers that take no LoRA; the message lists those that do.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    # the section has PEFT's own names
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, **spec.model_dump())
    try:
        return get_peft_model(language_model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        # PEFT wraps layers one by one and stops at the first unfit one.
        _remove_partial_adapter(language_model)
        raise LanguageModelError(
            f"LoRA cannot be attached to {spec.target_modules}: "
            f"{first_line(error).partition('. ')[0]}; set train.adapter.target_modules to a list "
            f"of layers that take it: {', '.join(_lora_target_modules(language_model))}"
        ) from None


def _lora_target_modules(language_model: PreTrainedModel) -> list[str]:
    """Return the names of linear layers that take LoRA, without the head."""
    from peft import LoraConfig, get_peft_model

    head = language_model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    fitting = []
    for name in sorted(names):
        # Tried one by one: which layers PEFT takes depends on its release and the quantization.
        try:
            get_peft_model(language_model, LoraConfig(r=1, target_modules=[name]))
        except ValueError:
            continue
        finally:
            _remove_partial_adapter(language_model)
        fitting.append(name)
    return fitting


def _remove_partial_adapter(language_model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(language_model.named_modules()):
        if isinstance(module, BaseTunerLayer) and name:
            language_model.set_submodule(name, module.get_base_layer())
    if hasattr(language_model, "peft_config"):
        del language_model.peft_config


def place_adapter(language_model: nn.Module) -> None:
    """Put each LoRA where its layer computes, if a device map keeps weights of layers elsewhere."""
    for layer in language_model.modules():
        # accelerate's mark of a layer whose weights come to a device for each call
        hook = getattr(getattr(layer, "base_layer", None), "_hf_hook", None)
        devices = [getattr(h, "execution_device", None) for h in getattr(hook, "hooks", [hook])]
        device = next((device for device in devices if device is not None), None)
        if device is None:
            continue
        for name in getattr(layer, "adapter_layer_names", ()):
            part = getattr(layer, name)
            # PEFT has put it beside the weights, which may be on no device at all
            is_empty = any(p.is_meta for p in part.parameters())
            part.to_empty(device=device) if is_empty else part.to(device)


def adapter_parameters(language_model: nn.Module) -> list[nn.Parameter]:
    """Return the LoRA parameters; empty if no adapter is attached."""
    return [p for name, p in language_model.named_parameters() if "lora_" in name]

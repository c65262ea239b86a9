"""FSDP2: every process holds a piece of the language model, and all of what stands beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from multi_token.distributed import is_main_process, num_processes
from multi_token.errors import LanguageModelError, RecipeError
from multi_token.language_model.forward import base_language_model
from multi_token.language_model.quantization import quantized_parameters
from multi_token.model import MultiTokenForConditionalGeneration


class FsdpShards:
    """The language model of one model, cut into pieces (Zhao et al., PyTorch FSDP, VLDB 2023).

    A layer's pieces are put together for its forward and backward, and gradients are averaged into
    pieces. The unit of the embeddings, the last norm and the head is the whole model, since
    embeddings are asked for outside of the language model's forward. Encoders, projectors and
    adapters are whole in every process, and their gradients are averaged after each step.
    """

    def __init__(self, model: MultiTokenForConditionalGeneration, *, replicas: int = 1) -> None:
        """Cuts the model in place; there is no way back but to load it again.

        `replicas`: groups of processes that hold all pieces each (HSDP), which then exchange only
        gradients. Raises RecipeError if processes cannot be divided so, LanguageModelError for a
        language model that cannot be cut.
        """
        if quantized_parameters(model.language_model):
            raise LanguageModelError(
                "train.fsdp cuts floating-point weights, and those of the language model are "
                "quantized as they come; set train.fsdp to null"
            )
        self.model = model
        self._whole: nn.Module | None = None
        if model.trained_language_model and is_main_process():
            # what is written in the end, filled again each time
            self._whole = copy.deepcopy(model.language_model).cpu()
        sharded = {id(p) for p in _language_model_parameters(model)}
        beside = {p for p in model.parameters() if id(p) not in sharded}
        mesh = _mesh(model.device.type, replicas)
        for layer in decoder_layers(model.language_model):
            fully_shard(layer, mesh=mesh, ignored_params=beside)
        fully_shard(model, mesh=mesh, ignored_params=beside)

    @property
    def num_sharded(self) -> int:
        """Parameters of which a process holds a piece."""
        return sum(isinstance(p, DTensor) for p in self.model.parameters())

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Average the gradients outside the language model, in one order and all at once.

        One by one as they are made would not do: a process without a modality makes them in
        another order.
        """
        learned = [
            p for p in self.model.parameters() if p.requires_grad and not isinstance(p, DTensor)
        ]
        for dtype in sorted({p.dtype for p in learned}, key=str):
            some = [p for p in learned if p.dtype == dtype]
            for parameter in some:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            flat = torch.cat([p.grad.reshape(-1) for p in some if p.grad is not None])
            distributed.all_reduce(flat)
            flat /= num_processes()
            pieces = flat.split([p.numel() for p in some])
            for parameter, piece in zip(some, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)

    def gather(self) -> None:
        """The whole language model into the first process, for `unsharded`; all take part."""
        whole = dict(self._whole.state_dict(keep_vars=True)) if self._whole is not None else {}
        if not self.model.trained_language_model:
            return  # it is not written
        for name, tensor in self.model.language_model.state_dict().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if whole:
                whole[name].data.copy_(full)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Within it, in the first process, the model has the language model as it was gathered."""
        if self._whole is None:
            yield
            return
        sharded = self.model.language_model
        self.model.language_model = self._whole
        try:
            yield
        finally:
            self.model.language_model = sharded


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with whole tensors on the CPU, as one process would have it.

    All take part, in one order; only the first process keeps what comes of it.
    """
    state = optimizer.state_dict()
    keeps = is_main_process()
    found: dict[Any, dict[str, Any]] = {}
    for number, entries in state["state"].items():
        for key, value in entries.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if keeps:
                full = full.cpu() if isinstance(full, Tensor) else full
                found.setdefault(number, {})[key] = full
    return {**state, "state": found}


def shard_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """Shard a state of whole tensors as the parameters are; a pre-hook of `load_state_dict`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in state["state"].items():
        parameter = parameters[int(number)]
        if not isinstance(parameter, DTensor):
            continue
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[key] = distribute_tensor(
                    value.to(parameter.device), parameter.device_mesh, parameter.placements
                )
    return state


def _mesh(device: str, replicas: int) -> DeviceMesh:
    num = num_processes()
    if num % replicas or num == replicas:
        raise RecipeError(
            f"train.fsdp.replicas is {replicas}, but {num} processes cannot be divided into so "
            "many groups of at least two"
        )
    if replicas == 1:
        return init_device_mesh(device, (num,))
    return init_device_mesh(
        device, (replicas, num // replicas), mesh_dim_names=("replicas", "shards")
    )


def _language_model_parameters(model: MultiTokenForConditionalGeneration) -> list[nn.Parameter]:
    """The weights of the language model itself: adapters stay whole."""
    return [p for name, p in model.language_model.named_parameters() if ".lora_" not in name]


def decoder_layers(language_model: Any, asked_by: str = "train.fsdp") -> list[nn.Module]:
    """Its layers, as transformers names their classes.

    Raises LanguageModelError, which names the line of the recipe, for a class that names none.
    """
    inner = base_language_model(language_model)
    kinds = set(getattr(inner, "_no_split_modules", None) or ())
    layers = [m for m in inner.modules() if type(m).__name__ in kinds]
    if not layers:
        raise LanguageModelError(
            f"{asked_by} needs to know the layers of {type(inner).__name__}, whose class names "
            f"none (`_no_split_modules`); leave {asked_by} out"
        )
    return layers

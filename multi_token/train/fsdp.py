"""FSDP2 of the language model: each process holds a shard of it.

language model     sharded by layer; gradients averaged by FSDP2, into shards
encoders,          replicated; gradients averaged by `FsdpShards.average_gradients`
projectors,
adapters
saves              gathered tensor by tensor into a copy on the CPU of the main process
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from multi_token.distributed import is_main_process, num_processes
from multi_token.errors import LanguageModelError, RecipeError
from multi_token.language_model.forward import base_language_model
from multi_token.language_model.quantization import quantized_parameters
from multi_token.model import MultiTokenForConditionalGeneration


class FsdpShards:
    """Shards of a model's language model (Zhao et al., PyTorch FSDP, VLDB 2023).

    A layer is gathered for its forward and backward. Embeddings, last norm and head belong to the
    unit of the model, not of the language model. The model looks embeddings up before the language
    model's forward, so they would still be sharded then.
    """

    def __init__(self, model: MultiTokenForConditionalGeneration, *, replicas: int = 1) -> None:
        """Shard the model in place, which only loading it again undoes.

        `replicas`: groups of processes with all shards each (HSDP), which exchange only gradients.
        Raises RecipeError if the processes cannot be divided into `replicas` groups,
        LanguageModelError for a language model that cannot be sharded.
        """
        if quantized_parameters(model.language_model):
            raise LanguageModelError(
                "train.fsdp shards floating-point weights, and this language model's weights are "
                "quantized; set train.fsdp to null"
            )
        self.model = model
        self._whole: nn.Module | None = None
        if model.trained_language_model and is_main_process():
            # filled by `gather` for each save: one copy on the CPU, no second one on the device
            self._whole = copy.deepcopy(model.language_model).cpu()
        # Replicated parts (adapters too) stay outside: a rank whose rows lack a modality never
        # calls them, and would be missing in the gather of their shards.
        weights = model.language_model.named_parameters()
        sharded = {id(p) for name, p in weights if ".lora_" not in name}
        beside = {p for p in model.parameters() if id(p) not in sharded}
        mesh = _mesh(model.device.type, replicas)
        # layers first: the unit of the model takes only parameters that no inner unit owns
        for layer in decoder_layers(model.language_model):
            fully_shard(layer, mesh=mesh, ignored_params=beside)
        fully_shard(model, mesh=mesh, ignored_params=beside)

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Average the gradients of the replicated parameters.

        All at once, in the order of the parameters. With one all-reduce for each gradient, a rank
        whose rows lack a modality would come in another order, and all ranks would hang.
        """
        trained = [
            p for p in self.model.parameters() if p.requires_grad and not isinstance(p, DTensor)
        ]
        # sorted, since a set has another order in each process
        for dtype in sorted({p.dtype for p in trained}, key=str):
            some = [p for p in trained if p.dtype == dtype]
            for parameter in some:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            flat = torch.cat([p.grad.reshape(-1) for p in some if p.grad is not None])
            distributed.all_reduce(flat)
            flat /= num_processes()
            pieces = flat.split([p.numel() for p in some])
            for parameter, piece in zip(some, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)

    def reshard(self) -> None:
        """Drop all gathered weights; every process calls it after forwards without a backward.

        FSDP2 reshards the outermost unit in a backward only. A process that drops these weights
        alone (`state_dict` does, as a save calls it) would gather in the next forward what the
        others still hold, out of step with them.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gather(self) -> None:
        """Gather the language model into the main process, for `unsharded`. A collective call."""
        self.reshard()  # before the main process calls `state_dict` alone, to write
        if not self.model.trained_language_model:
            return  # a frozen language model is referenced by a checkpoint, not saved
        whole = dict(self._whole.state_dict(keep_vars=True)) if self._whole is not None else {}
        for name, tensor in self.model.language_model.state_dict().items():
            # every rank takes part in each gather; one full tensor at a time is on a device
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if whole:
                whole[name].data.copy_(full)

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Put the gathered language model into the main process's model for a save."""
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
    """Return an optimizer's state with full tensors on the CPU, as one process would have it.

    A collective call: all ranks gather in one order, and only the main process keeps the result.
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
    """Shard a state of full tensors as the parameters are: a pre-hook of `load_state_dict`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in state["state"].items():
        parameter = parameters[int(number)]
        if not isinstance(parameter, DTensor):
            continue
        for key, value in entries.items():
            # moments have the shape of their parameter; step counters are scalars and stay
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[key] = distribute_tensor(
                    value.to(parameter.device), parameter.device_mesh, parameter.placements
                )
    return state


def _mesh(device: str, replicas: int) -> DeviceMesh:
    num = num_processes()
    if num % replicas or num == replicas:
        raise RecipeError(
            f"train.fsdp.replicas is {replicas}, but {num} processes cannot be divided into "
            f"{replicas} equal groups of at least two"
        )
    if replicas == 1:
        return init_device_mesh(device, (num,))
    return init_device_mesh(
        device, (replicas, num // replicas), mesh_dim_names=("replicas", "shards")
    )


def decoder_layers(language_model: Any, asked_by: str = "train.fsdp") -> list[nn.Module]:
    """Return the decoder layers of a language model.

    `asked_by`: recipe key for the message. Raises LanguageModelError for a model class that does
    not name its layers.
    """
    inner = base_language_model(language_model)
    # transformers names the classes of layers that accelerate must keep on one device
    kinds = set(getattr(inner, "_no_split_modules", None) or ())
    layers = [m for m in inner.modules() if type(m).__name__ in kinds]
    if not layers:
        raise LanguageModelError(
            f"{asked_by} needs the layers of {type(inner).__name__}, whose class names none "
            f"(`_no_split_modules`); leave {asked_by} out"
        )
    return layers

"""FSDP2 of the language model: each process holds a shard of it.

language model     on the host, mapped from its files, until it is cut layer by layer: never whole
                   on a device; gradients averaged by FSDP2, into shards
encoders,          replicated; gradients averaged by `FsdpShards.average_gradients`
projectors,
adapters
saves              gathered tensor by tensor into the main process's host memory, for that time
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from multi_token.checkpoint.load import copy_full
from multi_token.distributed import is_main_process, num_processes
from multi_token.errors import LanguageModelError, RecipeError
from multi_token.language_model.forward import base_language_model
from multi_token.language_model.quantization import quantized_parameters
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.train import TrainSpec


class FsdpShards:
    """Shards of a model's language model (Zhao et al., PyTorch FSDP, VLDB 2023).

    A layer is gathered for its forward and backward. Embeddings, last norm and head belong to the
    unit of the model, not of the language model. The model looks embeddings up before the language
    model's forward, so they would still be sharded then.
    """

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        device: torch.device,
        *,
        replicas: int = 1,
        bf16: bool = False,
    ) -> None:
        """Shard the model in place on a device, which only loading it again undoes.

        `bf16`: layers are gathered in bfloat16; weights that are trained stay float32 in shards,
        and gradients are summed in float32.
        `replicas`: groups of processes with all shards each (HSDP), which exchange only gradients.
        Raises RecipeError if the processes cannot be divided into `replicas` groups,
        LanguageModelError for a language model that cannot be sharded.
        """
        _check_not_quantized(model.language_model)
        self.model = model
        self._whole: nn.Module | None = None
        self._empty: nn.Module | None = None
        if model.trained_language_model and is_main_process():
            # copied before layers become FSDP's; `gather` fills it for each save
            self._empty = _without_weights(model.language_model)
        # Replicated parts (adapters too) stay outside: a rank whose rows lack a modality never
        # calls them, and would be missing in the gather of their shards.
        weights = model.language_model.named_parameters()
        sharded = {id(p) for name, p in weights if ".lora_" not in name}
        beside = {p for p in model.parameters() if id(p) not in sharded}
        for parameter in beside:  # adapters were attached on the host
            parameter.data = parameter.data.to(device)
        policy = mixed_precision_policy(bf16)
        mesh = _mesh(device.type, replicas)
        # layers first: the unit of the model takes only parameters that no inner unit owns
        for layer in decoder_layers(model.language_model):
            if model.trained_language_model:
                layer.float()  # on the host, where a layer is alone
            fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=beside)
        if model.trained_language_model:
            model.language_model.float()
        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=beside)

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
        gathered: dict[int, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for name, tensor in self.model.language_model.state_dict(keep_vars=True).items():
            if id(tensor) not in gathered:  # of tied weights once
                # every rank takes part in each gather; one full tensor at a time is on a device
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                is_parameter = isinstance(tensor, nn.Parameter)
                full = full.detach().cpu() if self._empty is not None else full.new_empty(0)
                gathered[id(tensor)] = nn.Parameter(full, False) if is_parameter else full
            whole[name] = gathered[id(tensor)]
        if self._empty is not None:
            self._whole = copy.deepcopy(self._empty)
            self._whole.load_state_dict(whole, assign=True)

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
            self._whole = None  # host memory of a whole model, for the time of a save


def _without_weights(language_model: nn.Module) -> nn.Module:
    """Return a copy whose parameters are on the meta device; tied ones stay tied."""
    known: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in language_model.parameters()
    }
    return copy.deepcopy(language_model, known)


def mixed_precision_policy(bf16: bool) -> MixedPrecisionPolicy:
    """Return FSDP2's precision of gathered weights and of the sum of gradients."""
    if not bf16:
        return MixedPrecisionPolicy()
    # inputs as they are: autocast decides on them, as in one process
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def is_sharded(spec: TrainSpec) -> bool:
    """Return True if the processes of this run shard the language model."""
    return spec.fsdp is not None and num_processes() > 1


def check_hooks_of_trainer() -> None:
    """Raise RecipeError if transformers' Trainer cannot train a model that is sharded already."""
    # 5.18 would wrap the shards in DDP; 5.19 has this method, and leaves such a model as it is
    if not hasattr(Trainer, "_sync_replicated_trainable_parameters"):
        raise RecipeError(
            "train.fsdp in several processes needs transformers 5.19 or newer, and "
            f"{transformers.__version__} is installed; upgrade it, or leave train.fsdp out"
        )


def run_in_shards(language_model: Any, device: torch.device, *, bf16: bool) -> None:
    """Shard a language model alone, to try a few tokens with it. All processes call it alike."""
    _check_not_quantized(language_model)
    mesh, policy = _mesh(device.type, 1), mixed_precision_policy(bf16)
    for module in (*decoder_layers(language_model), language_model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    with torch.no_grad():
        # the first forward gathers embeddings and head, which stay until the end
        language_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))


def _check_not_quantized(language_model: nn.Module) -> None:
    if quantized_parameters(language_model):
        raise LanguageModelError(
            "train.fsdp shards floating-point weights, and this language model's weights are "
            "quantized; set train.fsdp to null"
        )


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


@torch.no_grad()
def shard_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """Shard a state of full tensors as the parameters are: a pre-hook of `load_state_dict`.

    Full tensors may be mapped from a file. The result does not refer to them.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in state["state"].items():
        parameter = parameters[int(number)]
        for key, value in entries.items():
            if not isinstance(value, Tensor):
                continue
            # moments have the shape of their parameter; step counters are scalars
            is_sharded = isinstance(parameter, DTensor) and value.shape == parameter.shape
            like = parameter if is_sharded else value
            entries[key] = torch.empty_like(like, dtype=value.dtype)
            copy_full(value, entries[key])
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

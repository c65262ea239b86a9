"""Simulated accelerator: a device `sim` that computes on the CPU and logs its borders.

A PrivateUse1 device of torch with a tensor subclass. Every operator runs on CPU memory, and `LOG`
gets an entry, with the line that caused it, for each

- sync: a read by the host (item, bool, int, tolist, a copy to the CPU, nonzero, a boolean index,
  `repeat_interleave` by a tensor, synchronize). There the host of a real device waits for it.
- upload: a copy from the CPU to the device. `blocking` ones are host syncs as well: the host of a
  real device waits for all that was queued before the copy.
- mix: an operator with a tensor of the CPU, of one axis or more, beside one of the device. On a
  real device that is an error.

It shows missing device moves and host syncs. It shows nothing of time, memory, kernels, half
precision, streams or several devices; attention is computed by its formula. Where weights are
written, their storage has no address: whole weights of a language model cannot be saved.

Import it before `multi_token`, and in a process of its own: torch renames a device once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers.integrations.sdpa_attention as transformers_sdpa
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "sim"
_PACKAGE = str(Path(__file__).resolve().parents[2] / "multi_token") + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep

Kind = Literal["sync", "upload", "mix"]
Owner = Literal["ours", "libraries", "backward"]
"""Cause of an entry: `ours` if the innermost frame that is not torch's lies in `multi_token`.
`backward`: autograd, which runs in a thread without such a frame."""


@dataclass
class Log:
    """Counts of (kind, owner, operator, line)."""

    counts: Counter[tuple[Kind, Owner, str, str]] = field(default_factory=Counter)
    num_operators: int = 0

    def add(self, kind: Kind, operator: str) -> None:
        owner, line = _cause()
        self.counts[kind, owner, operator, line] += 1

    def reset(self) -> None:
        self.counts.clear()
        self.num_operators = 0

    def lines(self, kind: Kind, *owners: Owner) -> dict[str, int]:
        """Return `owner operator at line` -> count."""
        return {
            f"{owner}: {operator} at {line}": num
            for (of_kind, owner, operator, line), num in self.counts.items()
            if of_kind == kind and (not owners or owner in owners)
        }


LOG = Log()


def _cause() -> tuple[Owner, str]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith((_TORCH, "<")) and "threading" not in name:
            owner: Owner = "ours" if name.startswith(_PACKAGE) else "libraries"
            short = name.removeprefix(_PACKAGE).rpartition("site-packages" + os.sep)[-1]
            return owner, f"{short}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward", "autograd"


class _Backend(_DummyBackendModule):
    """Functions that torch, accelerate and transformers ask of `torch.<device>`."""

    __name__ = f"torch.{NAME}"

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, *_: Any) -> None:
        LOG.add("sync", "synchronize")

    def empty_cache(self) -> None:
        pass

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        return 10**9, 2 * 10**9

    def memory_allocated(self, *_: Any) -> int:
        return 0

    memory_reserved = max_memory_allocated = memory_allocated

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def set_rng_state(self, state: Any, device: Any = None) -> None:
        pass

    def get_rng_state_all(self) -> list[Tensor]:
        return [self.get_rng_state()]

    def set_rng_state_all(self, states: Any) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass

    manual_seed_all = manual_seed

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(f"{NAME}:0")
os.environ["ACCELERATE_TORCH_DEVICE"] = str(DEVICE)


class DeviceTensor(Tensor):
    """Tensor of the device; `raw` is its memory, on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> DeviceTensor:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        LOG.add("sync", "tolist")
        return self.raw.tolist()

    def new_tensor(self, data: Any, dtype: Any = None, **_: Any) -> Tensor:  # type: ignore[override]
        return _TENSOR(data, dtype=dtype or self.dtype).to(DEVICE)

    def numpy(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"can't convert {NAME} tensor to numpy")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Within, tensors can be made on the device: without one as input, a subclass is not asked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_READ_BY_HOST = ("nonzero", "masked_select", "unique_dim", "_unique2", "repeat_interleave")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, DeviceTensor) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    tensors = [*_tensors(args), *_tensors(list(kwargs.values()))]
    on_device = any(isinstance(t, DeviceTensor) for t in tensors)
    to_device = _is_device(kwargs.get("device"))
    to_cpu = kwargs.get("device") is not None and not to_device
    if not on_device and not to_device:
        return func(*args, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory",)}
    if to_device:
        kwargs["device"] = torch.device("cpu")
    if name == "_to_copy":
        upload = "copy" if kwargs.pop("non_blocking", False) else "blocking copy"
        if on_device and to_cpu:
            LOG.add("sync", "copy to the CPU")
        elif not on_device and to_device:
            LOG.add("upload", upload)
        copied = func(*tree_map(_raw, args), **kwargs)
        return copied if to_cpu else DeviceTensor(copied)
    if name == "copy_":
        target, source = args[0], args[1]
        if isinstance(target, DeviceTensor) != isinstance(source, DeviceTensor):
            is_upload = isinstance(target, DeviceTensor)
            is_free = any(map(bool, args[2:])) or kwargs.get("non_blocking", False)
            LOG.add("upload" if is_upload else "sync", "copy_" if is_free else "blocking copy_")
        func(_raw(target), _raw(source))
        return target
    if on_device:
        LOG.num_operators += 1
        _log_reads(name, args, tensors)
    known: dict[int, DeviceTensor] = {}

    def raw(value: Any) -> Any:
        if isinstance(value, DeviceTensor):
            known[id(value.raw)] = value
        return _raw(value)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, DeviceTensor):
            return value
        return known[id(value)] if id(value) in known else DeviceTensor(value)

    output = func(*tree_map(raw, args), **tree_map(raw, kwargs))
    return output if to_cpu else tree_map(wrapped, output)


def _log_reads(name: str, args: Any, tensors: list[Tensor]) -> None:
    on_cpu = [t for t in tensors if not isinstance(t, DeviceTensor) and t.ndim > 0]
    if name == "_local_scalar_dense":
        LOG.add("sync", "item, bool or int")
    elif name in _READ_BY_HOST:
        LOG.add("sync", name)
    elif name in _INDEXED:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            LOG.add("sync", "boolean index")
        # indices of the CPU are uploaded by torch itself
        on_cpu = [t for t in on_cpu if not any(t is index for index in indices)]
    if on_cpu:
        LOG.add("mix", name)


_TENSOR, _AS_TENSOR = torch.tensor, torch.as_tensor
_SDPA = torch.nn.functional.scaled_dot_product_attention


def _made_on_cpu(make: Callable[..., Tensor]) -> Any:
    """torch.tensor and torch.as_tensor do not pass the dispatcher: made on the CPU, then moved."""

    def made(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        if _is_device(device):
            return make(data, *args, **options).to(device)
        if device is not None:
            options["device"] = device
        return make(data, *args, **options)

    return made


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by its formula, since kernels do not take a wrapper."""
    if not isinstance(query, DeviceTensor):
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return _SDPA(query, key, value, attn_mask, dropout_p, **options)
    if enable_gqa:
        # a number and not a tensor: no sync on a real device either
        num = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(num, -3), value.repeat_interleave(num, -3)
    scores = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -1e30)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


_THREAD_RUN = threading.Thread.run


def _thread_run(thread: threading.Thread) -> None:
    # modes are per thread, and the local engine has one of its own
    with _Factories():
        _THREAD_RUN(thread)


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Within, the device exists for factories of tensors, for attention and in new threads."""
    torch.tensor, torch.as_tensor = _made_on_cpu(_TENSOR), _made_on_cpu(_AS_TENSOR)
    torch.nn.functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    transformers_sdpa.torch.nn.functional.scaled_dot_product_attention = _attention
    threading.Thread.run = _thread_run  # type: ignore[method-assign]
    try:
        with _Factories():
            yield
    finally:
        torch.tensor, torch.as_tensor = _TENSOR, _AS_TENSOR
        torch.nn.functional.scaled_dot_product_attention = _SDPA
        transformers_sdpa.torch.nn.functional.scaled_dot_product_attention = _SDPA
        threading.Thread.run = _THREAD_RUN  # type: ignore[method-assign]


@contextlib.contextmanager
def unsimulated() -> Iterator[None]:
    """Within, torch is as it is: weights are read from files here."""
    with _disable_current_modes():
        torch.tensor, torch.as_tensor = _TENSOR, _AS_TENSOR
        try:
            yield
        finally:
            torch.tensor, torch.as_tensor = _made_on_cpu(_TENSOR), _made_on_cpu(_AS_TENSOR)

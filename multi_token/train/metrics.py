"""Metrics of training steps: tokens, padding, data wait, encoder time, FLOPs, gradient norms.

Batches, gradients and clocks are read; training is unchanged. The trainer logs the numbers, so
TensorBoard and other loggers get them from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.train.dpo import PreferencePair
from multi_token.train.flops import CountFlops, LanguageModelCost, TokenCounts, num_elements
from multi_token.types import BatchCounts, Sample

COUNTS: tuple[str, ...] = (
    "tokens",
    "supervised",
    "positions",
    "flops",
    "step_s",
    "wait_s",
    "encoder_s",
)
"""Counts that are summed between two logs, on each device."""

ROW_IDS = "row_ids"
"""Key of a batch with the ids of its rows, for messages; for a bad row, its error."""


@dataclass(frozen=True)
class WithRowIds:
    """Collator that adds the ids of the rows to the batch of another one."""

    collator: Callable[[Any], Any]

    def __call__(self, samples: Sequence[Sample | PreferencePair]) -> dict[str, Any]:
        """Samples -> their Batch with `row_ids`."""
        plain = [one.sample if isinstance(one, PreferencePair) else one for one in samples]
        names = [sample.error or sample.id for sample in plain]
        return {**self.collator(samples), ROW_IDS: names}


class StepMetrics(TrainerCallback):
    """Sums over the steps since the last log, fed by the trainer around each batch."""

    def __init__(
        self, model: MultiTokenForConditionalGeneration, *, peak_tflops: float | None = None
    ) -> None:
        """`peak_tflops`: peak of one device, for `mfu`; without it there is none."""
        self.model = model
        self.peak_tflops = peak_tflops
        self.last_flops = 0.0
        self.last_tokens = 0
        self.norms: dict[str, Tensor] = {}
        self._began: float | None = None
        # hooks count inside a training step alone, not in evaluations and samples
        self.in_step = False
        self.media_flops = 0.0
        self._hooks: list[ForwardHook] = []
        self.reset()

    def attach(self) -> None:
        """Hook encoders and projectors, and compute the language model's cost."""
        self.detach()
        parts = (*self.model.projectors.parameters(), *self.model.encoders.parameters())
        self.cost = LanguageModelCost.of(
            self.model.language_model, trains_before=any(p.requires_grad for p in parts)
        )
        encoders, projectors = self.model.encoders.values(), self.model.projectors.values()
        self._hooks = [ForwardHook(encoder, self, timed=True) for encoder in encoders]
        self._hooks += [ForwardHook(projector, self, timed=False) for projector in projectors]

    def reset(self) -> None:
        """Set all counts to zero, for another stage."""
        self.detach()
        self.cost: LanguageModelCost | None = None
        self.sums = dict.fromkeys(COUNTS, 0.0)
        self.totals = dict.fromkeys(COUNTS, 0.0)

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextmanager
    def timing_data_wait(self) -> Iterator[None]:
        """Measure the wait for the batches of a step, with which the step begins."""
        self._began = time.perf_counter()
        yield
        self.sums["wait_s"] += time.perf_counter() - self._began

    @contextmanager
    def timing_step(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Count one batch, around its forward and backward."""
        if self.cost is None:
            self.attach()
        assert self.cost is not None
        self.in_step, self.media_flops = True, 0.0
        try:
            yield
        finally:
            self.in_step = False
        # of the collator's counts: reading the batch would wait for the device
        counts: BatchCounts = inputs["counts"]
        selects_logits = self.model.capabilities.supports_logits_to_keep
        work = count_tokens(counts, supports_logits_to_keep=selects_logits)
        texts = inputs.get("teacher")  # the teacher's rows: a forward pass without a backward
        taught = 0 if texts is None else self.cost.forward(count_tokens(texts["counts"]))
        self.last_flops = (
            taught + self.cost.forward(work) + self.cost.backward(work) + self.media_flops
        )
        self.sums["flops"] += self.last_flops
        self.last_tokens = work.num_tokens
        self.sums["tokens"] += self.last_tokens
        self.sums["supervised"] += counts.num_supervised
        self.sums["positions"] += inputs["input_ids"].numel()

    def total(self, name: str) -> float:
        """Return a count since the trainer was built, on this device."""
        return self.totals[name] + self.sums[name]

    @property
    def data_wait(self) -> float | None:
        """Share of the steps' time spent waiting for batches; None before the first step."""
        seconds = self.total("step_s")
        return round(self.total("wait_s") / seconds, 4) if seconds else None

    def pop(self, reduce: Any = None) -> dict[str, float]:
        """Return the metrics since the last call, and start new sums.

        `reduce`: sums a tensor over all devices.
        """
        for hook in self._hooks:
            self.sums["encoder_s"] += hook.seconds()
        sums, num_devices = dict(self.sums), 1
        for name in COUNTS:
            self.totals[name] += self.sums[name]
            self.sums[name] = 0.0
        if reduce is not None:
            # a one beside the sums counts the devices: one collective for all of them
            own = torch.tensor([*sums.values(), 1.0], dtype=torch.float64)
            *totals, devices = reduce(own).tolist()
            sums, num_devices = dict(zip(sums, totals, strict=True)), round(devices)
        if not sums["step_s"] or not sums["positions"]:
            return {}
        # devices step together, so the mean of their times is the time of a step
        seconds = sums["step_s"] / num_devices
        fill = sums["tokens"] / sums["positions"]
        tflops = sums["flops"] / seconds / num_devices / 1e12
        facts = {
            "tokens_per_second": round(sums["tokens"] / seconds, 1),
            "supervised_tokens_per_second": round(sums["supervised"] / seconds, 1),
            "supervised_fraction": round(sums["supervised"] / max(sums["tokens"], 1), 4),
            "padding_fraction": round(1 - fill, 4),
            "pack_use": round(fill, 4),
            "data_wait_fraction": round(sums["wait_s"] / sums["step_s"], 4),
            "encoder_fraction": round(sums["encoder_s"] / sums["step_s"], 4),
            "tflops_per_device": float(f"{tflops:.4g}"),
        }
        if self.peak_tflops is not None:
            facts["mfu"] = float(f"{tflops / self.peak_tflops:.4g}")
        return facts

    def gradient_norms(self, total: float | None) -> dict[str, float]:
        """Return the gradient norm of each group in the last step, before clipping.

        `total`: norm over all groups before clipping, which the trainer logs.
        """
        found = {name: float(norm) for name, norm in self.norms.items()}
        clipped = sum(norm**2 for norm in found.values()) ** 0.5
        if not clipped and total:
            return {}  # DeepSpeed's ZeRO keeps gradients in buffers of its own, without groups
        # the gradients were read after clipping, which scales all groups alike
        scale = total / clipped if total is not None and clipped > 0 else 1.0
        return {f"grad_norm/{name}": norm * scale for name, norm in found.items()}

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Compute the norms in steps that are logged: it reads every gradient once more."""
        step = state.global_step + 1
        if (
            args.logging_strategy != "steps"
            or step % max(int(state.logging_steps), 1) == 0
            or (step == 1 and args.logging_first_step)
        ):
            self.norms = group_norms(optimizer.param_groups)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._began is not None:
            self.sums["step_s"] += time.perf_counter() - self._began
            self._began = None

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.detach()


class ForwardHook:
    """Hooks of an encoder or projector: FLOPs, and with `timed` the time of its forward.

    FLOPs are counted in the first call, and scaled by the number of input elements from then on.
    """

    def __init__(self, module: nn.Module, step_metrics: StepMetrics, *, timed: bool) -> None:
        self.step_metrics = step_metrics
        self.timed = timed
        self._counter: CountFlops | None = None
        self._forward_per_element: float | None = None
        # FLOPs of linear layers in the first call: forward, backward
        self._linear = [0, 0]
        self._linear_handles: list[Any] = []
        self._open: list[Any] = []
        self._spans: list[tuple[Any, Any]] = []
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            # always_call: a forward that raises must not leave its start open
            module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def seconds(self) -> float:
        """Return the time in its forward since the last call."""
        total = 0.0
        for start, end in self._spans:
            if isinstance(start, float):
                total += end - start
            else:
                # waits for the device, but only when metrics are logged
                end.synchronize()
                total += start.elapsed_time(end) / 1000
        self._spans = []
        return total

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.step_metrics.in_step:
            return
        self._open.append(self._now())
        if self._forward_per_element is None:
            linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
            self._linear_handles = [p.register_forward_pre_hook(self._count_linear) for p in linear]
            # entered by hand: the hooks before and after a forward are two calls
            self._counter = CountFlops()
            self._counter.__enter__()

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._open:
            return
        size = num_elements(args) + num_elements(kwargs)
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            for handle in self._linear_handles:
                handle.remove()
            self._forward_per_element = self._counter.total / max(size, 1)
            self._counter = None
        start = self._open.pop()
        if self.timed:
            self._spans.append((start, self._now()))
        forward, backward = self._linear
        # 0 where the module is frozen, 2 where all of it is trained and passes gradients on
        backward_share = backward / forward if forward else 0.0
        per_element = self._forward_per_element or 0.0
        self.step_metrics.media_flops += size * per_element * (1 + backward_share)

    def _count_linear(self, part: Any, args: tuple[Any, ...]) -> None:
        flops = 2 * args[0].numel() * part.out_features
        self._linear[0] += flops
        if torch.is_grad_enabled():
            # one product for the gradient of the input, one for that of the weight
            self._linear[1] += flops * (int(args[0].requires_grad) + int(part.weight.requires_grad))

    def _now(self) -> Any:
        """Return a time; on a GPU, which works asynchronously, an event that will have one."""
        if not self.timed or self.step_metrics.model.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def count_tokens(counts: BatchCounts, *, supports_logits_to_keep: bool = True) -> TokenCounts:
    """Count the work of a batch; a segment attends to the prefix that it continues as well."""
    lengths, before = counts.lengths, counts.num_before
    return TokenCounts(
        num_tokens=sum(lengths),
        num_pairs=sum(length**2 for length in lengths)
        + sum(a * b for a, b in zip(lengths, before, strict=bool(before))),
        num_logits=counts.num_supervised if supports_logits_to_keep else sum(lengths),
    )


def group_norms(groups: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return group name -> 2-norm [] of the gradients in an optimizer's groups of that name."""
    gradients: dict[str, list[Tensor]] = {}
    for group in groups:
        found = [p.grad for p in group["params"] if p.grad is not None]
        gradients.setdefault(group.get("name", "all"), []).extend(found)
    norms = {}
    for name, found in gradients.items():
        # in float32: squares of 16-bit gradients overflow or vanish
        parts: list[Any] = [torch.linalg.vector_norm(g.detach().float()) for g in found]
        parts = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in parts]
        norms[name] = torch.linalg.vector_norm(torch.stack(parts)) if parts else torch.zeros(())
    return norms


def group_lrs(groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return `lr/projectors`, ...: the learning rate of each group of an optimizer."""
    return {f"lr/{group.get('name', 'all')}": float(group["lr"]) for group in groups}

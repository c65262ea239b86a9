"""train/compile.py: compiled layers learn the same, and what is not possible is said."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from multi_token.errors import RecipeError
from multi_token.language_model.lora import attach_adapter
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import AdapterSpec
from multi_token.train import trainer as trainer_module
from multi_token.train.compile import (
    check_can_compile,
    compile_enabled,
    compiled_layers,
    use_liger,
)
from multi_token.train.fsdp import decoder_layers
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]
# torch looks at it while it compiles, and hides the warning where warnings are no errors
GRAD_OF_NO_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def trained(fields: dict[str, Any]) -> Any:
    return train(Recipe.model_validate(fields), console=Console(quiet=True))


def loss_and_gradients(language_model: Any, num_tokens: int) -> list[torch.Tensor]:
    ids = torch.arange(num_tokens)[None] + 5
    language_model.zero_grad()
    loss = language_model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = [p.grad for p in language_model.parameters() if p.grad is not None]
    return [loss.detach(), *(g.clone() for g in grads)]


@pytest.mark.slow
@GRAD_OF_NO_LEAF
def test_layers_are_compiled_in_training_steps_only_and_give_the_same(model: Any) -> None:
    language_model = attach_adapter(copy.deepcopy(model.language_model), AdapterSpec(r=2))
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    names = list(language_model.state_dict())
    expected = {num: loss_and_gradients(language_model, num) for num in (6, 9)}
    with compiled_layers(language_model, backend=backend):  # type: ignore[arg-type]
        assert list(language_model.state_dict()) == names
        with compile_enabled(False):
            loss_and_gradients(language_model, 6)
        assert not graphs
        for num_tokens, those in expected.items():
            with compile_enabled(True):
                found = loss_and_gradients(language_model, num_tokens)
            assert len(found) == len(those) > 4
            torch.testing.assert_close(found, those, atol=1e-6, rtol=1e-5)
        num_graphs = len(graphs)
        assert num_graphs > 0
        loss_and_gradients(language_model, 7)
    with compile_enabled(True):
        loss_and_gradients(language_model, 8)
    assert len(graphs) == num_graphs, "compiled outside of training steps"


@GRAD_OF_NO_LEAF
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.slow
def test_what_inductor_makes_of_a_layer_gives_the_same(model: Any) -> None:
    if not any(shutil.which(name) for name in ("g++", "clang++")):
        pytest.skip("no C++ compiler")
    language_model = attach_adapter(copy.deepcopy(model.language_model), AdapterSpec(r=2))
    expected = loss_and_gradients(language_model, 6)
    with compiled_layers(language_model), compile_enabled(True):
        found = loss_and_gradients(language_model, 6)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@GRAD_OF_NO_LEAF
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"packing": True}], ids=["padded", "packed"])
def test_a_run_with_compiled_layers_is_the_run_without(
    recipe_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Any
) -> None:
    """Compiled as far as it takes no minutes: traced, with a backward pass that was traced too."""
    quick = partial(compiled_layers, backend="aot_eager")
    monkeypatch.setattr(trainer_module, "compiled_layers", quick)
    stages = [{"name": "adapter", "learn": {"projectors": 1e-3, "adapter": 1e-3}}]
    args = {
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        **({} if more else {"gradient_checkpointing": True}),
    }
    losses, weights = {}, {}
    for compile_layers in (False, True):
        out = tmp_path / str(compile_layers)
        trained(recipe_fields(out, stages=stages, args=args, compile_layers=compile_layers, **more))
        entries = json.loads(next(out.glob("stages/1-*/done.json")).read_text())["log_history"]
        losses[compile_layers] = [e["loss"] for e in entries if "loss" in e]
        weights[compile_layers] = {
            f"{file.name}: {key}": tensor
            for file in (out / "projectors.safetensors", *(out / "adapter").glob("*.safetensors"))
            for key, tensor in load_file(file).items()
        }
    assert len(losses[True]) == 4
    torch.testing.assert_close(losses[True], losses[False], atol=1e-5, rtol=1e-5)
    assert weights[True].keys() == weights[False].keys()
    for key, tensor in weights[False].items():
        torch.testing.assert_close(weights[True][key], tensor, atol=1e-5, rtol=0, msg=key)


def test_compiling_without_a_compiler_is_refused_before_anything_runs(
    recipe_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(RecipeError, match=r"compile_layers needs a C\+\+ compiler on the CPU"):
        trained(recipe_fields(tmp_path / "run", compile_layers=True))
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match=r"none was found \(CXX, g\+\+, clang\+\+, cl\)"):
        check_can_compile(CPU)


def test_liger_on_the_cpu_is_refused_before_anything_runs(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"train\.liger needs a GPU"):
        trained(recipe_fields(tmp_path / "run", liger=True))


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_liger_that_is_not_installed_is_said(model: Any) -> None:
    with pytest.raises(RecipeError, match="needs the package liger-kernel, which is not installed"):
        use_liger(model.language_model, GPU)


@pytest.fixture
def liger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package with its two names; its kernels need a GPU to be imported."""
    folder = tmp_path / "liger_kernel" / "transformers"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "monkey_patch.py").write_text("MODEL_TYPE_TO_APPLY_LIGER_FN = {'llama': None}\n")
    (folder / "__init__.py").write_text(
        "def _apply_liger_kernel_to_instance(model, **switches):\n    model.was_given = switches\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_liger_gets_the_language_model_below_its_adapter_and_leaves_the_loss_alone(
    model: Any, liger: None
) -> None:
    language_model = attach_adapter(copy.deepcopy(model.language_model), AdapterSpec(r=2))
    use_liger(language_model, GPU)
    inner = language_model.get_base_model()
    assert inner.was_given == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    inner.config.model_type = "a-new-one"
    with pytest.raises(RecipeError, match="no kernels for the model type 'a-new-one'"):
        use_liger(language_model, GPU)


def test_layers_are_those_of_the_language_model_with_an_adapter_as_well(model: Any) -> None:
    language_model = attach_adapter(copy.deepcopy(model.language_model), AdapterSpec(r=2))
    assert len(decoder_layers(language_model)) == len(decoder_layers(model.language_model)) == 2

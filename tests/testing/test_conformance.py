"""testing/conformance.py: a right modality passes, and each way of being wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from multi_token import registry
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.modalities.image import ImageModality
from multi_token.modalities.vector import VectorEncoder, VectorModality
from multi_token.projectors.kinds import Linear, Stack
from multi_token.testing import (
    Result,
    assert_conforms,
    check_modality,
    check_named,
    tiny_image_encoder,
)
from multi_token.types import Features, Prepared

SOURCES = [[0.5, -1.0, 2.0], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]
FEATURES = "the encoder gives the promised features"
TOKENS = "its projector makes the promised embeddings"
BATCH = "a mixed batch equals one by one"
SAME = "the same input gives the same features"
FROZEN = "a frozen encoder stays as it is"
AGAIN = "an encoder can be built again"
PICKLE = "it pickles without weights"
LOADS = "constructing loads nothing"
CONFIG = "its config round-trips"
REFUSES = "a source that cannot be read is refused in one sentence"
APART = "different items have different content"
FOUND = "its name leads to its class"
EXAMPLES = "its example sources can be decoded"
HEADER = "the length from the header is the prepared length"


class Fault(VectorModality):
    """A vector with an encoder that a test chooses."""

    type: Literal["fault"] = "fault"  # type: ignore[assignment]
    dim: int = 3
    made_of: ClassVar[Callable[[int], VectorEncoder]] = VectorEncoder

    def build_encoder(self) -> VectorEncoder:
        return self.made_of(self.dim)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """A class of modality, or of its encoder -> the claims that it breaks, with what was seen."""

    def check(
        cls: type[Fault] = Fault, *, encoder: type[VectorEncoder] = VectorEncoder
    ) -> dict[str, str]:
        monkeypatch.setattr(Fault, "made_of", encoder)
        monkeypatch.setitem(registry._registered["modality"], "fault", cls)
        return failed(check_modality(cls(), SOURCES))

    return check


def failed(results: list[Result]) -> dict[str, str]:
    return {result.claim: result.detail for result in results if not result.passed}


def computing(compute: Callable[[Tensor, Tensor], Features]) -> type[VectorEncoder]:
    """An encoder that makes its features so of values [items, length, dim] and their mask."""

    class Computing(VectorEncoder):
        def forward(self, **inputs: Tensor) -> Features:
            return compute(inputs["values"], inputs["mask"].bool())

    return Computing


@pytest.mark.parametrize("name", ["image", "vector"])
def test_the_built_in_modalities_keep_every_claim(name: str, tmp_path: Path) -> None:
    results = check_named(name, tmp_path)
    assert failed(results) == {}
    kinds = {r.claim.split()[1] for r in results if r.claim.startswith("projector ")}
    assert kinds == set(registry.registered_names("projector"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("siglip2", {}),
        ("siglip2", {"features": "mean", "layer": -2}),
        ("clip", {"features": "all", "layer": [1, -1]}),
        ("clip", {"pad_to_square": True, "projector": {"type": "pixel_shuffle"}}),
        (
            "siglip",
            {
                "tile_grids": [[1, 2], [2, 1], [2, 2]],
                "projector": {"type": "mlp", "line_break": True},
            },
        ),
    ],
)
def test_images_keep_every_claim_however_they_are_read(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    from PIL import Image

    images = [Image.effect_noise((50, 30), 90).convert("RGB"), Image.new("RGB", (20, 64), "red")]
    encoder = tiny_image_encoder(tmp_path / kind, kind)
    assert_conforms(ImageModality.model_validate({"encoder": encoder, **fields}), images)


def test_a_modality_that_is_right_breaks_nothing(broken: Any) -> None:
    assert broken(Fault) == {}


def test_a_wrong_number_of_features_is_named(broken: Any) -> None:
    class Wrong(Fault):
        def prepare(self, raw: Any) -> Prepared:
            item = super().prepare(raw)
            return Prepared(item.inputs, item.num_features + 1)

    found = broken(Wrong)
    assert "promises 2 features, the encoder gives 1" in found[FEATURES]
    assert "expected 20 embeddings of width 16 for a batch, got [12, 16]" in found[TOKENS]
    assert BATCH not in found and SAME not in found


def test_a_length_that_its_header_tells_otherwise_is_named(broken: Any) -> None:
    class Lying(Fault):
        def num_features_from_header(self, source: Any, fetch: Fetch) -> int:
            return 1

    assert broken(Lying)[HEADER] == (
        "source 1: its header promises 1 features, `prepare` 2; let `count_features` count as "
        "`prepare` does"
    )


def test_an_example_that_cannot_be_decoded_and_a_size_that_no_server_knows_are_named(
    broken: Any,
) -> None:
    class Unreadable(Fault):
        def example_sources(self) -> list[Any]:
            return [[0.5]]

    class Weighed(Fault):
        def size_of(self, raw: Any) -> dict[str, float]:
            return {"grams": 1.0}

    assert "expected a vector of 3 numbers" in broken(Unreadable)[EXAMPLES]
    assert broken(Weighed)[EXAMPLES].startswith("`size_of` of example 0 names 'grams'")


def test_a_wrong_width_and_numbers_that_are_none_are_named(broken: Any) -> None:
    wide = computing(lambda values, mask: Features(values.repeat(1, 1, 2), mask))
    assert broken(encoder=wide)[FEATURES] == "encoder.dim is 3, and the features are 6"
    roots = computing(lambda values, mask: Features(values.sqrt(), mask))
    assert "with NaN or inf" in broken(encoder=roots)[FEATURES]


def test_dropout_that_does_not_know_eval_mode_is_named(broken: Any) -> None:
    dropping = computing(lambda values, mask: Features(nn.functional.dropout(values), mask))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert "dropout" in broken(encoder=dropping)[SAME]


def test_preparing_by_chance_is_named(broken: Any) -> None:
    class Chance(Fault):
        def prepare(self, raw: Any) -> Prepared:
            item = super().prepare(raw)
            values = torch.rand_like(item.inputs["values"])
            return Prepared({**item.inputs, "values": values}, item.num_features)

    assert "give other 'values' the second time" in broken(Chance)[SAME]


@pytest.mark.parametrize("axis", [0, 1], ids=["over the batch", "over padding"])
def test_a_batch_that_differs_from_one_by_one_is_named(broken: Any, axis: int) -> None:
    centred = computing(
        lambda values, mask: Features(values - values.mean(axis, keepdim=True), mask)
    )
    found = broken(encoder=centred)
    assert "computed over the batch, or over padding" in found[BATCH]
    assert "a batch differs from one by one" in found[TOKENS]


def test_padding_without_a_mask_is_named(broken: Any) -> None:
    found = broken(encoder=computing(lambda values, _: Features(values)))
    assert "promises 1 features, the encoder gives 2" in found[FEATURES]
    assert "2 features in a batch, 1 alone" in found[BATCH]


class Counting(VectorEncoder):
    """Counts what it sees, as the statistics of batch normalization do."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, **inputs: Tensor) -> Features:
        self.seen += 1
        return super().forward(**inputs)


class Loud(VectorEncoder):
    """Drops out, and does not listen to eval()."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.dropout = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> Loud:
        super().train(True)
        return self

    def forward(self, **inputs: Tensor) -> Features:
        return Features(self.dropout(inputs["values"]), inputs["mask"].bool())


def test_an_encoder_that_changes_while_frozen_is_named(broken: Any) -> None:
    assert broken(encoder=Counting) == {FROZEN: "a forward pass changed seen"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = broken(encoder=Loud)
    assert found[FROZEN] == "the encoder is in training mode after eval()"
    assert SAME in found


class Random(VectorEncoder):
    """Starts from weights that are nowhere."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.linear = nn.Linear(dim, dim)

    def forward(self, **inputs: Tensor) -> Features:
        return Features(self.linear(inputs["values"]), inputs["mask"].bool())


class Learner(Random):
    """The same, and says so."""

    pretrained = False


class Hidden(VectorEncoder):
    """Says that it learns, and hides a weight from the checkpoint."""

    pretrained = False

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.factor = torch.rand(dim)

    def forward(self, **inputs: Tensor) -> Features:
        return Features(inputs["values"] * self.factor, inputs["mask"].bool())


def test_random_weights_that_no_checkpoint_would_hold_are_named(broken: Any) -> None:
    assert "set `pretrained = False` on Random" in broken(encoder=Random)[AGAIN]
    assert broken(encoder=Learner) == {}
    assert "state_dict does not hold" in broken(encoder=Hidden)[AGAIN]


class Heavy(Fault):
    """Keeps its encoder once it is built."""

    _kept: Any = PrivateAttr(default=None)

    def build_encoder(self) -> VectorEncoder:
        self._kept = super().build_encoder()
        return self._kept


class Early(Fault):
    """Makes weights when it is constructed."""

    _kept: Any = PrivateAttr(default_factory=lambda: torch.zeros(2, 3))


def test_weights_in_the_modality_are_named(broken: Any) -> None:
    heavy = "each data worker would get VectorEncoder; keep it in the encoder"
    assert broken(Heavy) == {PICKLE: heavy}
    assert "it holds a tensor [2, 3]" in broken(Early)[LOADS]


def test_what_cannot_be_pickled_is_named(broken: Any) -> None:
    class Local(Fault):
        """A class that no other process can find."""

    found = broken(Local)
    assert list(found) == [PICKLE] and "Local" in found[PICKLE]


class Opens(Fault):
    """Reads a file when it is constructed."""

    path: str = __file__

    def model_post_init(self, _: Any) -> None:
        Path(self.path).read_text(encoding="utf-8")


class Forgets(Fault):
    """Its JSON is not its config."""

    scale: float = 2.0

    def model_dump(self, **options: Any) -> dict[str, Any]:
        fields = super().model_dump(**options)
        return {**fields, "scale": 1.0} if options.get("mode") == "json" else fields


def test_reading_at_construction_and_a_config_that_changes_are_named(broken: Any) -> None:
    assert "cannot be constructed where path cannot be read" in broken(Opens)[LOADS]
    assert broken(Forgets) == {CONFIG: "scale changed in a round trip"}


def test_bad_input_that_is_no_sentence_is_named(broken: Any) -> None:
    class Crashes(Fault):
        def load(self, source: Any, fetch: Fetch) -> Any:
            return super().load(source[:], fetch)

    class Accepts(Fault):
        def load(self, source: Any, fetch: Fetch) -> Any:
            return super().load(source if isinstance(source, list) else [0.0, 0.0, 0.0], fetch)

    assert "raises TypeError" in broken(Crashes)[REFUSES]
    assert "without an error" in broken(Accepts)[REFUSES]


def test_content_that_mixes_items_up_is_named(broken: Any) -> None:
    class Mixes(Fault):
        def content(self, source: Any, fetch: Fetch) -> bytes:
            return b"always the same"

    assert "the same bytes for different sources" in broken(Mixes)[APART]


def test_a_crash_fails_its_claims_in_one_line_and_the_others_go_on(broken: Any) -> None:
    class Crash(Fault):
        def build_encoder(self) -> VectorEncoder:
            raise OSError("no such weight\nand a long story")

    found = broken(Crash)
    assert found[FEATURES] == "OSError: no such weight"
    assert REFUSES not in found and CONFIG not in found


def test_a_name_that_no_recipe_can_use_is_named() -> None:
    found = failed(check_modality(Fault(), SOURCES))
    assert "no modality 'fault' is registered" in found[FOUND]


def test_a_projector_that_breaks_its_promise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar(Linear):
        type: Literal["liar"] = "liar"  # type: ignore[assignment]

        def num_tokens(self, num_features: int) -> int:
            return num_features + 1

    monkeypatch.setitem(registry._registered["projector"], "liar", Liar)
    found = failed(check_modality(VectorModality(dim=3), SOURCES))
    assert found == {
        "projector liar makes the promised embeddings": "expected 5 embeddings of width 16 for a "
        "batch, got [3, 16]"
    }


def test_a_projector_that_refuses_does_not_fit() -> None:
    results = {r.claim: r for r in check_modality(VectorModality(dim=3), SOURCES)}
    result = results["projector pixel_shuffle makes the promised embeddings"]
    assert result.passed and result.detail.startswith("does not fit: pixel_shuffle")


def test_assert_conforms_lists_what_is_broken() -> None:
    assert_conforms(VectorModality(dim=3, projector=Stack(factor=2)), SOURCES)
    with pytest.raises(AssertionError, match=r"Fault does not keep its contract:\n- its name"):
        assert_conforms(Fault(), SOURCES)


def test_one_source_and_a_modality_without_an_example_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(MultiTokenError, match="at least two different sources"):
        check_modality(VectorModality(dim=3), SOURCES[:1])

    class Bare(Fault):
        kit_example: ClassVar[str] = ""

    monkeypatch.setitem(registry._registered["modality"], "fault", Bare)
    with pytest.raises(MultiTokenError, match=r"nothing to check 'fault' on: let Bare\.example"):
        check_named("fault", tmp_path)


def test_a_class_that_inherits_an_example_is_the_one_that_is_tried_on_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(registry._registered["modality"], "fault", Fault)
    results = {result.claim: result for result in check_named("fault", tmp_path)}
    assert results[FOUND].passed and results[FOUND].detail == "type: fault"

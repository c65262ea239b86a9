"""convert/push.py, model_card.py: the card describes the run, and only the result is uploaded."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from multi_token.checkpoint.save import save
from multi_token.convert.export import export
from multi_token.convert.push import push
from multi_token.errors import MultiTokenError
from multi_token.language_model.lora import attach_adapter
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import AdapterSpec, Trainable, TrainableEncoder
from multi_token.train.parameter_groups import freeze_and_unfreeze


@pytest.fixture(scope="module")
def local_run(recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: Any) -> Path:
    """A run whose parts are folders of this machine."""
    folder = tmp_path_factory.mktemp("local")
    torch.manual_seed(1)
    save(
        MultiTokenForConditionalGeneration.from_spec(
            Recipe.model_validate(recipe_fields(folder)).model
        ),
        folder,
    )
    return folder


@pytest.fixture
def run(local_run: Path, recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """A whole run, with what training leaves beside the result."""
    out = tmp_path / "whole"
    export(local_run, out, to="merged")
    Recipe.model_validate(recipe_fields(tmp_path / "secret" / "out")).save(out / "recipe.yaml")
    (out / "stages" / "1-projector").mkdir(parents=True)
    done = {"log_history": [{"train_runtime": 90.0}, {"train_runtime": 30.0}]}
    (out / "stages" / "1-projector" / "done.json").write_text(json.dumps(done))
    (out / "cache").mkdir()
    (out / "cache" / "features.safetensors").write_bytes(b"x")
    report = {"held_out_accuracy": 0.975, "machine": {"cpu": "two cores"}, "examples": [1]}
    (out / "report.json").write_text(json.dumps(report))
    return out


def test_a_dry_run_writes_the_card_and_lists_the_result_alone(run: Path) -> None:
    files = push(run, "ada/seer", dry_run=True)
    assert files["projectors.safetensors"] == (run / "projectors.safetensors").stat().st_size
    tops = {name.partition("/")[0] for name in files}
    assert tops == {
        *("config.json", "projectors.safetensors", "README.md", "recipe.yaml"),
        *("language_model", "encoders"),
    }


def test_trained_encoders_go_up_with_the_run(run: Path) -> None:
    model = MultiTokenForConditionalGeneration.from_pretrained(run)
    freeze_and_unfreeze(
        model, Trainable(encoders={"image": TrainableEncoder(lr=1e-5, last_layers=1)})
    )
    save(model, run)
    files = push(run, "ada/seer", dry_run=True)
    assert files["encoders.safetensors"] == (run / "encoders.safetensors").stat().st_size > 10_000


def test_the_card_has_a_command_and_code_that_run(run: Path) -> None:
    push(run, "ada/seer", dry_run=True)
    card = (run / "README.md").read_text()
    header, _, body = card.removeprefix("---\n").partition("\n---\n")
    fields = yaml.safe_load(header)
    assert fields["library_name"] == "multi_token"
    assert fields["pipeline_tag"] == "image-text-to-text"
    assert "image" in fields["tags"]
    for sentence in (
        "| `<image>` | image | in this repository | expand (factor 3, num_layers 2) |",
        'multi-token ask ada/seer "What is this?" --image cat.png',
        'from_pretrained("ada/seer")',
        "rows.jsonl`, split `train`",
        "learn:",
        "| cpu | two cores |",
        "| training | 120 s |",
        "| held out accuracy | 0.975 |",
    ):
        assert sentence in body, sentence
    (python,) = (part.partition("```")[0] for part in body.split("```python\n")[1:])
    compile(python, "card", "exec")


def test_the_header_names_base_model_encoder_and_data_sets_of_the_hub(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["model"]["language_model"] = "lab/model"
    config["model"]["modalities"]["image"]["encoder"] = "lab/eye"
    config["adapter"] = True
    (run / "config.json").write_text(json.dumps(config))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["train"].append({"rows": "lab/rows", "split": "train"})
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    push(run, "ada/seer", dry_run=True)
    fields = next(yaml.safe_load_all((run / "README.md").read_text().partition("<!--")[0]))
    assert fields["base_model"] == ["lab/model", "lab/eye"]
    assert fields["base_model_relation"] == "adapter"
    assert fields["datasets"] == ["lab/rows"]


def test_nothing_that_goes_up_holds_a_path_of_this_machine(run: Path, tmp_path: Path) -> None:
    from multi_token.convert.push import _files

    push(run, "ada/seer", dry_run=True)
    config = json.loads((run / "config.json").read_text())
    for name, source in _files(run, "ada/seer", config):
        data = source if isinstance(source, bytes) else source.read_bytes()
        assert str(tmp_path.parent).encode() not in data, name


def test_a_card_that_push_did_not_write_stays(run: Path) -> None:
    (run / "README.md").write_text("my own words")
    assert push(run, "ada/seer", dry_run=True)["README.md"] == len("my own words")


def test_folders_of_this_machine_are_refused(local_run: Path) -> None:
    with pytest.raises(MultiTokenError, match="language_model is .*--to merged"):
        push(local_run, "ada/seer", dry_run=True)
    assert not (local_run / "README.md").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MultiTokenError, match=r"has no config\.json"):
        push(tmp_path, "ada/seer", dry_run=True)


def test_an_adapter_goes_up_with_the_base_model_s_own_name(
    run: Path, recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    model = MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(recipe_fields(tmp_path)).model
    )
    model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2))
    save(model, tmp_path / "adapted")
    config = json.loads((tmp_path / "adapted" / "config.json").read_text())
    config["model"]["language_model"] = "lab/model"
    config["model"]["modalities"]["image"]["encoder"] = "lab/eye"
    (tmp_path / "adapted" / "config.json").write_text(json.dumps(config))
    from multi_token.convert.push import _files

    files = dict(_files(tmp_path / "adapted", "ada/seer", config))
    adapter = files["adapter/adapter_config.json"]
    assert isinstance(adapter, bytes)
    assert json.loads(adapter)["base_model_name_or_path"] == "lab/model"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP contract that an upload needs; records the requests."""

    requests: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, body))
        here = f"http://{self.headers['Host']}/ada/seer"
        answer: dict[str, Any] = {"url": here}
        if "preupload" in self.path:
            files = json.loads(body)["files"]
            answers = [{"path": f["path"], "uploadMode": "regular"} for f in files]
            answer = {"files": [{**one, "shouldIgnore": False, "oid": None} for one in answers]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{here}/commit/1", "commitOid": "1"}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield handler
        server.shutdown()


def test_the_upload_is_one_commit_of_the_result(run: Path, hub: type[Hub]) -> None:
    files = push(run, "ada/seer", private=True, revision="v1")
    paths = [path for path, _ in hub.requests]
    assert paths[0] == "/api/repos/create" and b"private" in hub.requests[0][1]
    commits = [body for path, body in hub.requests if path == "/api/models/ada/seer/commit/v1"]
    assert len(commits) == 1
    lines = [json.loads(line) for line in commits[0].splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    assert {path: len(data) for path, data in sent.items()} == files
    assert sent["projectors.safetensors"] == (run / "projectors.safetensors").read_bytes()
    assert yaml.safe_load(sent["recipe.yaml"])["train"]["output_dir"] == "runs/seer"


def test_an_upload_without_a_connection_is_refused_with_the_remedy(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MultiTokenError, match="could not be uploaded to ada/seer: .*log in"):
        push(run, "ada/seer")

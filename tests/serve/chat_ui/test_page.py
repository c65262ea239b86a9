"""The chat page in a real Chromium, served by a real server with a tiny model."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from multi_token.media.audio import decode_audio
from multi_token.media.waveform import Excerpt
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.types import Conversation, Media, Message, Text
from tests.serve.page_run import HOSTILE, page_run
from tests.serve.running_server import KEY, RunningServer, npy, png, running

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
RED, BLUE = png((220, 30, 30)), png((30, 60, 220))
NUM_TOKENS = 8
ANSWERED = ".turn.assistant:not(.waiting)"


@pytest.fixture(scope="module")
def run_folder(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return page_run(recipe_fields, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page_server(served_model: Any, run_folder: Path) -> Iterator[RunningServer]:
    settings = {
        "api_keys": (KEY,),
        "run_folder": run_folder,
        "show_examples": True,
        "default_max_tokens": 400,
    }
    with running(served_model, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def asked(browser: Any) -> Iterator[list[str]]:
    """Every URL that a page of any test requested."""
    yield []


@pytest.fixture
def page(browser: Any, page_server: RunningServer, asked: list[str]) -> Iterator[Any]:
    """The page, just opened; it may request only this server, and log no error."""
    context = browser.new_context()
    context.set_default_timeout(10_000)
    page = context.new_page()
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda message: faults.append(message.text) if "Security Policy" in message.text else None,
    )
    page.goto(page_server.url)
    yield page
    assert not page.evaluate("window.hacked")
    context.close()
    assert [url for url in asked if not url.startswith((page_server.url, "blob:", "data:"))] == []
    assert faults == []


@pytest.fixture
def opened(page: Any) -> Any:
    """The page after its key was typed, with short answers."""
    give_key(page, KEY)
    page.wait_for_selector("#modalities li")
    page.evaluate(f"document.getElementById('max-tokens').value = {NUM_TOKENS}")
    return page


def give_key(page: Any, key: str) -> None:
    page.wait_for_selector("dialog[open]")
    page.fill("#key", key)
    page.press("#key", "Enter")


def drop(page: Any, *files: tuple[str, str, bytes]) -> None:
    """Drop files on the page: (name, type, bytes)."""
    given = [[name, kind, base64.b64encode(data).decode()] for name, kind, data in files]
    transfer = page.evaluate_handle(
        """files => {
          const transfer = new DataTransfer();
          for (const [name, type, data] of files) {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            transfer.items.add(new File([bytes], name, {type}));
          }
          return transfer;
        }""",
        given,
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("main", event, {"dataTransfer": transfer})


def ask(page: Any, text: str) -> str:
    """Type, press Enter, and read the answer when it is complete."""
    number = page.locator(ANSWERED).count()
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.locator(ANSWERED).nth(number).wait_for()
    return page.locator(f"{ANSWERED} .words").last.text_content()


def generated(model: Any, *messages: Message) -> str:
    (answer,) = model.generate([Conversation(messages)], max_new_tokens=NUM_TOKENS)
    return answer


def test_a_dropped_image_is_sent_with_the_question(
    opened: Any, served_model: Any, asked: list[str]
) -> None:
    drop(opened, ("red.png", "image/png", RED))
    opened.wait_for_selector("#waiting img[alt='red.png']")
    answer = ask(opened, "What is this?")
    first = Message("user", (Media("image", RED), Text("\n"), Text("What is this?")))
    assert answer.strip() == generated(served_model, first)
    assert answer.strip() and opened.locator("#waiting li").count() == 0
    assert "image 3 tokens" in opened.text_content(".after")

    again = ask(opened, "And now?")
    said = Message("assistant", (Text(answer),))
    second = Message("user", (Text("And now?"),))
    assert again.strip() == generated(served_model, first, said, second)
    assert sum("/v1/chat/completions" in url for url in asked) == 2


def test_several_modalities_go_in_one_message_without_what_was_removed(
    opened: Any, served_model: Any
) -> None:
    drop(
        opened,
        ("red.png", "image/png", RED),
        ("blue.png", "image/png", BLUE),
        ("v.npy", "", npy(1, 2, 3, 4, 5)),
        ("w.csv", "text/csv", b"a,b,c,d,e\n5,4,3,2,1\n"),
    )
    opened.wait_for_selector("#waiting li:nth-child(4)")
    opened.click("button[aria-label='Remove red.png']")
    answer = ask(opened, "What are they?")
    items = (
        Media("image", BLUE),
        Media("vector", npy(1, 2, 3, 4, 5)),
        Media("vector", npy(5, 4, 3, 2, 1)),
    )
    parts = [part for item in items for part in (item, Text("\n"))]
    message = Message("user", (*parts, Text("What are they?")))
    assert answer.strip() == generated(served_model, message)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("letter.docx", b"PK", "This model does not take “letter.docx”. It takes image: images"),
        ("empty.png", b"", "“empty.png” is empty."),
        ("v.csv", b"a,b\nc,d\n", "“v.csv” should hold numbers"),
        ("v.json", b'[1, "2"]', "“v.json” should hold numbers"),
        (f"{HOSTILE}.exe", b"MZ", f"This model does not take “{HOSTILE}.exe”"),
    ],
)
def test_wrong_files_are_refused_before_anything_is_sent(
    name: str, content: bytes, sentence: str, opened: Any, asked: list[str]
) -> None:
    drop(opened, (name, "", content))
    opened.wait_for_selector("#note:not([hidden])")
    assert opened.text_content("#note").startswith(sentence)
    assert opened.locator("#waiting li").count() == 0
    assert not any("/v1/" in url for url in asked)


def test_an_error_of_the_server_is_shown_with_its_message(opened: Any) -> None:
    drop(opened, ("short.json", "", b"[1, 2]"))
    opened.wait_for_selector("#waiting li")
    ask(opened, "What is it?")
    said = opened.text_content(".fault")
    assert "5" in said and "2" in said and said.endswith(".")
    assert opened.is_visible("button.again")
    # a failed turn is not sent again with the next one
    assert ask(opened, "Hello") != ""


def test_an_answer_can_be_stopped(opened: Any, page_server: RunningServer) -> None:
    engine = page_server.service.engine
    opened.evaluate("document.getElementById('max-tokens').value = 400")
    opened.fill("#text", "Tell me all")
    opened.press("#text", "Enter")
    opened.locator(".waiting .words", has_text=re.compile("....")).wait_for()
    opened.click("#stop")
    opened.wait_for_selector(ANSWERED)
    assert opened.text_content(".after").startswith("Stopped")
    assert page_server.wait_until(lambda: engine.num_running == 0, 2)
    whole = page_server.service.prompts.processor.chat.tokenizer(
        opened.text_content(".words >> nth=-1")
    )
    assert 0 < len(whole["input_ids"]) < 400
    opened.click("#new")
    assert opened.locator(".turn").count() == 0 and opened.is_visible("#welcome")


def test_names_and_answers_stay_text(opened: Any) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": HOSTILE}, "finish_reason": None}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    opened.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )
    drop(opened, (f"{HOSTILE}.png", "image/png", RED), (f"{HOSTILE}.npy", "", npy(1, 2, 3, 4, 5)))
    opened.wait_for_selector("#waiting li:nth-child(2)")
    assert opened.locator("#waiting .label").first.text_content().startswith(HOSTILE)
    assert ask(opened, HOSTILE) == HOSTILE
    assert opened.locator(".turn.user .words").text_content() == HOSTILE
    assert opened.locator("[onerror]").count() == 0


def test_a_wrong_key_is_asked_for_again(page: Any) -> None:
    give_key(page, "sk-wrong-key")
    page.wait_for_selector("#key-note.refused")
    assert page.locator("#modalities li").count() == 0
    give_key(page, KEY)
    page.wait_for_selector("#modalities li")
    assert not page.locator("dialog[open]").count()
    page.reload()  # the tab keeps the key
    page.wait_for_selector("#modalities li")
    assert page.evaluate("localStorage.length") == 0
    assert KEY not in page.content()


def test_an_example_is_one_click(opened: Any, served_model: Any, data: Path) -> None:
    opened.wait_for_selector("#examples li:nth-child(5)")
    hostile = opened.locator(".example", has_text=HOSTILE)
    assert hostile.locator(".question").text_content() == f"{HOSTILE} is ‹vector›?"
    assert hostile.locator(".expected").text_content() == "expected (held out): a vector"
    red = opened.locator(".example", has_text="expected: red")
    red.click()
    opened.wait_for_selector(ANSWERED)
    message = Message("user", (Text("What is "), Media("image", str(data / "red.png")), Text("?")))
    answer = opened.text_content(f"{ANSWERED} .words")
    assert answer.strip() == generated(served_model, message)


def test_enter_sends_and_shift_enter_does_not(opened: Any) -> None:
    opened.fill("#text", "one")
    opened.press("#text", "Shift+Enter")
    opened.keyboard.type("two")
    assert opened.locator(".turn").count() == 0
    opened.press("#text", "Enter")
    opened.wait_for_selector(ANSWERED)
    assert opened.text_content(".turn.user .words") == "one\ntwo"


def test_the_report_opens_by_its_link_and_runs_no_script(opened: Any, asked: list[str]) -> None:
    opened.context.on("request", lambda request: asked.append(request.url))
    with opened.context.expect_page() as popup:
        opened.click("#report")
    popup.value.wait_for_load_state()
    assert popup.value.text_content("h1") == "Trained"
    assert popup.value.title() == "Report"


def test_audio_is_recorded_as_wav(opened: Any, page_server: RunningServer) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    facts = httpx.get(f"{page_server.url}/page/facts", headers=headers).json()
    assert not opened.is_visible("#record")
    sound = {"kind": "audio", "noun": "audio files", "suffixes": [".wav"]}
    facts["modalities"].append({"name": "speech", "type": "speech", "takes": [sound]})
    opened.context.grant_permissions(["microphone"])
    opened.route("**/page/facts", lambda route: route.fulfill(json=facts))
    opened.reload()
    opened.click("#record")
    opened.locator("#recorded", has_text="1 s").wait_for()
    opened.click("#record")
    opened.wait_for_selector("#waiting audio")
    part = opened.evaluate("waiting[0]")
    assert part["modality"] == "speech" and part["name"] == "recording.wav"
    wave = decode_audio(base64.b64decode(part["data"]), Excerpt(rate=16_000))
    assert 8_000 < len(wave) < 80_000 and abs(wave).max() > 0.01  # the fake device beeps


def test_the_page_fits_a_phone(opened: Any) -> None:
    opened.set_viewport_size({"width": 360, "height": 640})
    drop(opened, ("a-very-long-name-" * 9 + ".png", "image/png", RED))
    opened.wait_for_selector("#waiting li")
    ask(opened, "long " * 60 + "x" * 200)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360


def test_every_control_has_a_name(opened: Any) -> None:
    nameless = opened.evaluate(
        """[...document.querySelectorAll('button, input, textarea, select, a')].filter(node =>
             !node.getAttribute('aria-label') && !node.labels?.length && !node.textContent.trim()
           ).map(node => node.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.slow
def test_the_demos_own_images_are_named(browser: Any) -> None:
    run = Path(__file__).parents[3] / "runs" / "demo"
    if not (run / "config.json").is_file():
        pytest.skip("`multi-token demo` has not been run here")
    names = ("dog", "banana", "cactus")
    with running(
        MultiTokenForConditionalGeneration.from_pretrained(run),
        run_folder=run,
        show_examples=True,
        name="demo",
    ) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#modalities li")
        answers = []
        for name in names:
            image = (run / "data" / "images" / name / "held_out_000.png").read_bytes()
            drop(page, ("what.png", "image/png", image))
            page.wait_for_selector("#waiting img")
            answers.append(ask(page, "What is this?").strip())
            page.click("#new")
        page.close()
    right = sum(map(str.__eq__, answers, names))
    assert right >= 2, answers  # it names 97 of 100 held-out images

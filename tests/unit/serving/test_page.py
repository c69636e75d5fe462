"""The page: its files, its settings as a request, a link, curl and Python, run by Node, and what a browser makes of it."""

import base64
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import openai
import pytest
from playwright.sync_api import Browser, Page, expect
from starlette.testclient import TestClient

from selma_ray.models.config import SamplingConfig
from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.encoding import PNG, encode
from selma_ray.serving.served import ModelNames
from tests.chromium import faults_of
from tests.local_service import served
from tests.unit.serving.recorder import Recorder, picture

SETTINGS = str(files("selma_ray.serving.page").joinpath("settings.js"))
SCRIPTS = ("settings.js", "page.js")
CONFIG = ServingConfig(sampling=SamplingConfig(steps=20, guidance_scale=2.0, width_px=64, height_px=64))
PROMPTS = ("two blue bananas", 'it\'s "quoted" \\ $HOME `x`\nsecond line', "été 猫 🐈 & a=b#c%20+d", "</script>{{x}}")
FULL = {
    "prompt": "a cat", "negative": "blurry", "size": "32x48", "seed": 7, "steps": 5, "guidance": 7.55, "count": 2, "best": 3,
    "left": "base", "right": "mix of experts", "mix": {"counting": 0.25, "style": 0},
}  # fmt: skip

needs_node = pytest.mark.skipif(
    shutil.which("node") is None, reason="there is no Node here to run the page's functions"
)


def evaluated(expression: str, *arguments: Any) -> Any:
    """Evaluate an expression over the page's functions in `page` and JSON arguments in `given`."""
    script = (
        f"const page = require({json.dumps(SETTINGS)}); const given = JSON.parse(require('fs').readFileSync(0));"
        f"console.log(JSON.stringify({expression}))"
    )
    answer = subprocess.run(
        ["node", "-e", script], input=json.dumps(arguments), capture_output=True, text=True, check=True
    )
    return json.loads(answer.stdout)


@pytest.fixture
def app(backend: Recorder) -> Any:
    return build_app(backend, CONFIG, ModelNames("merged", base=True, experts=("counting", "style")), ())


def test_the_page_loads_its_own_files_alone(app: Any) -> None:
    client = TestClient(app, "http://127.0.0.1:8000", client=("127.0.0.1", 5))
    html = client.get("/").text
    for name in (*SCRIPTS, "page.css"):
        assert f'"{name}"' in html
        assert client.get(f"/{name}").status_code == 200
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


@needs_node
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_parsed(name: str) -> None:
    path = files("selma_ray.serving.page").joinpath(name)
    subprocess.run(["node", "--check", str(path)], check=True, timeout=60)


def test_every_element_that_the_script_asks_for_is_on_the_page() -> None:
    page = files("selma_ray.serving.page")
    script, html = page.joinpath("page.js").read_text(), page.joinpath("page.html").read_text()
    asked = set(re.findall(r'element\("([\w-]+)"\)', script))
    assert len(asked) > 20
    assert {each for each in asked if f'id="{each}"' not in html} == set()


@needs_node
def test_settings_become_the_request_that_they_say() -> None:
    assert evaluated("page.bodyOf(given[0], given[1])", FULL, {"counting": 1}) == {
        "prompt": "a cat", "model": {"counting": 1}, "seed": 7, "negative_prompt": "blurry", "size": "32x48",
        "num_inference_steps": 5, "guidance_scale": 7.55, "n": 2, "best_of": 3,
    }  # fmt: skip
    assert evaluated("page.bodyOf({prompt: 'a', seed: 0, count: 1}, 'base')") == {
        "prompt": "a", "model": "base", "seed": 0
    }  # fmt: skip


@needs_node
def test_a_link_restores_the_settings() -> None:
    every = [FULL | {"prompt": prompt} for prompt in PROMPTS]
    assert evaluated("given.map((each) => page.fromHash(page.toHash(each)))", *every) == every
    assert evaluated("page.fromHash('#seed=x&steps=&guidance=1e999&other=1&mix.counting=NaN')") == {"mix": {}}


@needs_node
@pytest.mark.parametrize("with_key", [False, True])
def test_the_request_as_curl_is_the_request(with_key: bool) -> None:
    for prompt in PROMPTS:
        body = {"prompt": prompt, "model": {"counting": 0.5}, "seed": 3}
        command = evaluated("page.asCurl('http://127.0.0.1:8000', given[0], given[1])", body, with_key)
        words = [word for word in shlex.split(command) if word != "\n"]
        assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/images/generations"]
        assert json.loads(words[words.index("-d") + 1]) == body
        assert ("Authorization: Bearer $SELMA_API_KEY" in words) == with_key


@needs_node
@pytest.mark.parametrize("model", ["base", {"counting": 0.5, "style": -0.25}])
def test_the_request_as_python_draws_what_the_page_draws(
    app: Any, backend: Recorder, model: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SELMA_API_KEY", "none")
    with served(app) as url:
        for prompt in PROMPTS:
            body = evaluated("page.bodyOf(given[0], given[1])", FULL | {"prompt": prompt, "best": None}, model)
            code = evaluated("page.asPython(given[0], given[1], true)", url, body)
            assert openai.__name__ in code
            exec(compile(code, "page", "exec"), {})
            request = backend.requests[-2]
            assert (request.prompt, request.seed, request.guidance_scale, request.size_px) == (
                prompt,
                7,
                7.55,
                (48, 32),
            )
            assert (request.negative_prompt, request.steps) == ("blurry", 5)
            assert dict(request.mix or ()) == ({} if model == "base" else model)
    assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")


@needs_node
def test_a_file_has_a_name_that_every_system_takes() -> None:
    names = evaluated("given.map((prompt) => page.fileName(prompt, 'mix of experts', 7))", *PROMPTS, "x" * 500)
    for name in names:
        assert name.endswith("-7.png")
        assert len(name) < 90
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.")


@pytest.fixture
def shown(chromium: Browser, app: Any) -> Iterator[Page]:
    page = chromium.new_page()
    page.set_default_timeout(30_000)
    with served(app) as url:
        page.goto(f"{url}/#prompt=a+linked+cat&seed=9&steps=5&guidance=7.55&count=2&right=counting")
        expect(page.locator("#status")).to_have_text("Ready")
        yield page
        page.close()


def test_a_link_fills_the_page_and_its_images_can_be_chosen_and_downloaded(shown: Page, backend: Recorder) -> None:
    faults = faults_of(shown)
    assert (shown.input_value("#prompt"), shown.input_value("#guidance")) == ("a linked cat", "7.55")
    shown.locator("#generate").click()
    expect(shown.locator("#status")).to_have_text("Done")
    assert sorted((request.seed, request.mix) for request in backend.requests if request.mix) == [
        (9, (("counting", 1.0),)), (10, (("counting", 1.0),)),
    ]  # fmt: skip
    before = shown.get_attribute("#right .picture img", "src")
    shown.locator("#right .thumbnail").nth(1).click()
    assert shown.get_attribute("#right .picture img", "src") != before
    assert shown.get_attribute("#right .download", "download") == "a-linked-cat-counting-10.png"
    shown.locator("#prompt").fill("another")
    shown.locator("#history .thumbnail").first.click()
    assert shown.input_value("#prompt") == "a linked cat"
    assert faults == []


def test_the_best_are_shown_and_an_own_image_is_scored(shown: Page, backend: Recorder) -> None:
    shown.locator("#best").fill("3")
    shown.locator("#fresh").check()
    shown.locator("#generate").click()
    expect(shown.locator("#status")).to_have_text("Done")
    assert len(backend.requests) == 6
    assert shown.input_value("#seed") != "9"
    expect(shown.locator("#left .thumbnail")).to_have_count(2)
    own = {"name": "mine.png", "mimeType": "image/png", "buffer": encode(picture(51), PNG)}
    shown.set_input_files("#own", own)  # type: ignore[arg-type]
    expect(shown.locator("#judge-note")).to_have_text("mine.png: 20% by red.")


_TRANSFER = """([name, type, data]) => {
    const transfer = new DataTransfer();
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    if (type) transfer.items.add(new File([bytes], name, { type }));
    else transfer.items.add(name, "text/plain");
    return transfer;
}"""


@pytest.mark.parametrize(
    ("name", "type_", "note"),
    [
        ("mine.png", "image/png", "mine.png: 20% by red."),
        ("mine.pdf", "application/pdf", "mine.pdf is not scored: it must be a PNG, JPEG or WebP image."),
        ("words", "", "Generate to see the answers."),
    ],
)
def test_an_image_dropped_anywhere_is_scored_and_nothing_else_is(shown: Page, name: str, type_: str, note: str) -> None:
    data = base64.b64encode(encode(picture(51), PNG)).decode()
    dragged = {"dataTransfer": shown.evaluate_handle(_TRANSFER, [name, type_, data])}
    shown.dispatch_event("header", "dragover", dragged)
    assert shown.locator("body.dropping").count() == (1 if type_ else 0)
    shown.dispatch_event("header", "drop", dragged)
    expect(shown.locator("#judge-note")).to_have_text(note)
    assert shown.locator("body.dropping").count() == 0


def test_an_image_dropped_while_others_are_drawn_is_refused_by_name(shown: Page, backend: Recorder) -> None:
    shown.evaluate("running = new AbortController()")
    data = base64.b64encode(encode(picture(51), PNG)).decode()
    shown.dispatch_event(
        "main", "drop", {"dataTransfer": shown.evaluate_handle(_TRANSFER, ["mine.png", "image/png", data])}
    )
    expect(shown.locator("#judge-note")).to_have_text(
        "mine.png is not scored: wait until the images are finished, or stop them."
    )

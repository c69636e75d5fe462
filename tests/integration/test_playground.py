"""The playground page in a real browser, over the real generator and judge of the miniature, without Ray."""

import base64
import io
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, expect

from benchmarks.playground_pictures import take_pictures
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.sources import GrammarQuestions
from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.experts import open_experts
from selma_ray.serving.generator import Generator
from selma_ray.serving.keys import ApiKey, read_keys
from selma_ray.serving.scorer import open_scorer
from selma_ray.serving.served import ServedModels
from tests.chromium import faults_of
from tests.local_service import LocalBackend, served
from tests.tiny_experts import save_experts

pytestmark = pytest.mark.heavy

KEY = "a-key-for-the-page-in-the-test"
CONFIG = ServingConfig(
    sampling=SamplingConfig(steps=8, guidance_scale=2.0, width_px=64, height_px=64),
    num_threads=1,
    max_steps=1000,
    request_timeout_s=3600,  # on a busy machine 1000 steps take minutes, and what would be late is refused
)
DESKTOP, PHONE = ViewportSize(width=980, height=1200), ViewportSize(width=390, height=800)
ENDED = re.compile("^(Done|Drawn, not scored|Not drawn|Stopped)$")
DRAW_TIMEOUT_MS = 60_000


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalBackend, ServedModels]]:
    model = ModelConfig()
    experts = save_experts(load_pipeline(model, "cpu"), tmp_path_factory.mktemp("experts"))
    models = ServedModels("merged", model, model, experts)
    generator = Generator(models, CONFIG, open_experts)
    yield LocalBackend(generator, open_scorer(JudgeConfig(), {}, GrammarQuestions())), models
    generator.close()


def serve(backend: tuple[LocalBackend, ServedModels], keys: tuple[ApiKey, ...] = ()) -> AbstractContextManager[str]:
    local, models = backend
    return served(build_app(local, CONFIG, models.names, keys))


@pytest.fixture(scope="module")
def url(backend: tuple[LocalBackend, ServedModels]) -> Iterator[str]:
    with serve(backend) as url:
        yield url


@pytest.fixture
def blank(chromium: Browser) -> Iterator[Page]:
    page = chromium.new_page(viewport=DESKTOP)
    page.set_default_timeout(DRAW_TIMEOUT_MS)
    yield page
    page.close()


@pytest.fixture
def page(blank: Page, url: str) -> Page:
    blank.goto(f"{url}/")
    wait_for_status(blank, "Ready")
    return blank


def wait_for_status(page: Page, status: str | re.Pattern[str]) -> None:
    expect(page.locator("#status")).to_have_text(status, timeout=DRAW_TIMEOUT_MS)


def wait_for_drawing(page: Page) -> None:
    wait_for_status(page, ENDED)
    assert text(page, "#status") == "Done", text(page, "#error")


def text(page: Page, selector: str) -> str:
    return page.locator(selector).text_content() or ""


def sources(page: Page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('.picture img')].map((image) => image.src)")


def pixels(source: str) -> bytes:
    """Return an image without what its file says, which names the model."""
    kind, _, content = source.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content))).tobytes()


def focused(page: Page, property_: str) -> str | None:
    return page.evaluate(f"document.activeElement.{property_}")


def test_a_prompt_is_drawn_by_both_models_and_judged_with_the_keyboard_alone(blank: Page, url: str) -> None:
    requested: list[str] = []
    blank.on("request", lambda request: requested.append(request.url))
    faults = faults_of(blank)
    page = blank
    page.goto(f"{url}/")
    wait_for_status(page, "Ready")
    assert focused(page, "id") == "prompt"
    page.keyboard.press("Control+a")
    page.keyboard.type("two blue bananas to the left of a red car")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#right progress")).not_to_have_js_property("value", 0)
    wait_for_drawing(page)
    left, right = sources(page)
    # The merged model here is the base itself: from one seed both draw one image.
    assert pixels(left) == pixels(right)
    assert "two blue bananas" in (page.locator("img").first.get_attribute("alt") or "")
    assert text(page, "#left .verdict").split("%")[0].isdigit()
    assert "Is there a car?" in page.locator("#answers tbody th").all_text_contents()
    assert text(page, "#judge-note").startswith("No answers differ. Answers are those of miniature@")
    assert text(page, "#right .latency").endswith(" s")
    asked = {urlparse(address).netloc for address in requested if not address.startswith("data:")}
    assert asked == {urlparse(url).netloc}
    assert faults == []


def test_a_mix_of_experts_is_set_with_sliders(page: Page) -> None:
    expect(page.locator("#mix")).to_be_hidden()
    page.locator("#right select").select_option("mix of experts")
    expect(page.locator("#mix")).to_be_visible()
    slider = page.locator("#sliders input").first
    before = float(slider.input_value())
    slider.press("ArrowRight")
    assert float(slider.input_value()) == pytest.approx(before + 0.05)
    page.locator("#generate").click()
    wait_for_drawing(page)
    left, right = sources(page)
    assert pixels(left) != pixels(right)
    assert text(page, "thead .answer:last-child") == "mix of experts"


def test_what_is_refused_is_shown_and_what_has_no_questions_is_drawn(page: Page) -> None:
    page.locator("#steps").fill("5000")
    page.keyboard.press("Control+Enter")
    wait_for_status(page, ENDED)
    assert "num_inference_steps must be at most 1000" in text(page, "#error")
    page.locator("#steps").fill("2")
    page.locator("#prompt").fill("democracy")
    page.keyboard.press("Control+Enter")
    wait_for_status(page, "Drawn, not scored")
    expect(page.locator("#error")).to_be_hidden()
    assert text(page, "#judge-note").startswith("No score: the judge has questions about scenes of its own world alone")


def test_another_model_does_not_take_over_the_picture_and_score_of_the_one_before(page: Page) -> None:
    page.locator("#steps").fill("2")
    page.locator("#guidance").fill("7.55")
    page.locator("#generate").click()
    wait_for_drawing(page)
    page.locator("#right select").select_option("counting")
    expect(page.locator("#right img")).to_be_hidden()
    expect(page.locator("#right .empty")).to_be_visible()
    assert text(page, "#right .verdict") == ""
    expect(page.locator("#answers")).to_be_hidden()
    expect(page.locator("#left img")).to_be_visible()
    assert "%" in text(page, "#left .verdict")


def test_a_key_with_an_odd_character_is_said_to_be_wrong(
    blank: Page, backend: tuple[LocalBackend, ServedModels], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(KEY)
    with serve(backend, read_keys(tmp_path / "keys")) as url:
        blank.goto(f"{url}/")
        blank.locator("#key").fill(f"{KEY}\u2019")
        blank.keyboard.press("Tab")
        expect(blank.locator("#error")).to_contain_text("The API key has a character that no key has")
        blank.locator("#key").fill(KEY)
        blank.keyboard.press("Tab")
        wait_for_status(blank, "Ready")
        blank.close()


def test_what_was_drawn_before_brings_its_settings_back(page: Page) -> None:
    page.locator("#steps").fill("2")
    page.locator("#seed").fill("3")
    page.locator("#negative").fill("blurry")
    page.locator("#generate").click()
    wait_for_drawing(page)
    page.locator("#fresh").check()
    page.locator("#prompt").fill("a red car")
    page.locator("#generate").click()
    wait_for_drawing(page)
    assert page.locator("#seed").input_value() != "3", "a new seed each time"
    entries = page.locator("#history > div")
    assert entries.count() == 2
    entries.last.locator("button").first.click()
    assert page.locator("#prompt").input_value() == "two blue bananas to the left of a red car"
    assert [page.locator(f"#{name}").input_value() for name in ("seed", "steps", "negative")] == ["3", "2", "blurry"]


def test_pictures_for_the_docs_are_taken(chromium: Browser, url: str, tmp_path: Path) -> None:
    light, dark = (Image.open(path).convert("L") for path in take_pictures(chromium, url, tmp_path))
    corners: Any = [each.getpixel((1, 1)) for each in (light, dark)]
    assert corners[0] > 200
    assert corners[1] < 60
    assert light.size == dark.size == (980, 1180)


def test_drawing_can_be_stopped(page: Page) -> None:
    page.locator("#steps").fill("900")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#stop")).to_be_visible()
    page.keyboard.press("Escape")
    wait_for_status(page, "Stopped")
    expect(page.locator("#generate")).to_be_visible()


def test_every_control_has_a_name_and_is_reached_with_tab(page: Page) -> None:
    page.locator("#right select").select_option("mix of experts")
    controls = "[...document.querySelectorAll('input, textarea, select, button')].filter((e) => e.offsetParent)"
    unnamed = f"{controls}.filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map((e) => e.id)"
    assert page.evaluate(unnamed) == []
    reached = set()
    for _ in range(
        page.evaluate(f"{controls}.length") + 2
    ):  # on its way round the focus is on the summary, and leaves the page
        page.keyboard.press("Tab")
        reached.add(focused(page, "id") or focused(page, "ariaLabel"))
    assert reached - {None} == set(page.evaluate(f"{controls}.map((e) => e.id || e.ariaLabel)"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_colour_scheme_and_fits_a_narrow_window(page: Page, scheme: Literal["light", "dark"]) -> None:
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme=scheme)
    corner: Any = Image.open(io.BytesIO(page.screenshot())).convert("L").getpixel((1, 1))
    assert corner < 60 if scheme == "dark" else corner > 200
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_a_key_is_asked_for_where_there_are_any(
    blank: Page, backend: tuple[LocalBackend, ServedModels], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(KEY)
    with serve(backend, read_keys(tmp_path / "keys")) as url:
        blank.goto(f"{url}/")
        expect(blank.locator("#key-field")).to_be_visible()
        assert focused(blank, "id") == "key"
        blank.keyboard.type(KEY)
        blank.keyboard.press("Tab")
        wait_for_status(blank, "Ready")
        blank.locator("#generate").click()
        wait_for_drawing(blank)
        blank.close()  # before the server, which waits for open connections

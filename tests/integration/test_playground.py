"""The playground page in a real browser, over the real generator and judge of the miniature, without Ray."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest
from PIL import Image

from selma_ray.models.config import ModelConfig, SamplingConfig
from selma_ray.models.rendering import load_pipeline
from selma_ray.serving.api import build_app
from selma_ray.serving.config import ServingConfig
from selma_ray.serving.experts import open_experts
from selma_ray.serving.generator import Generator
from selma_ray.serving.keys import ApiKey, read_keys
from selma_ray.serving.scorer import open_scorer
from selma_ray.serving.served import ServedModels
from tests.browser import CHROMIUM, Browser, chromium
from tests.local_service import LocalBackend, served
from tests.tiny_experts import save_experts

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]

KEY = "a-key-for-the-page-in-the-test"
CONFIG = ServingConfig(
    sampling=SamplingConfig(steps=8, guidance_scale=2.0, width_px=64, height_px=64), num_threads=1, max_steps=1000
)
STATUS = "document.getElementById('status')?.textContent"
ENDED = f"['Done', 'Drawn, not scored', 'Not drawn', 'Stopped'].includes({STATUS})"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalBackend, ServedModels]]:
    model = ModelConfig()
    experts = save_experts(load_pipeline(model), tmp_path_factory.mktemp("experts"))
    models = ServedModels("merged", model, model, experts)
    generator = Generator(models, CONFIG, open_experts)
    yield LocalBackend(generator, open_scorer("miniature")), models
    generator.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser") / "profile") as browser:
        browser.look(980, 1200)
        yield browser


def serve(backend: tuple[LocalBackend, ServedModels], keys: tuple[ApiKey, ...] = ()):
    local, models = backend
    return served(build_app(local, CONFIG, models.names, keys))


@pytest.fixture(scope="module")
def url(backend: tuple[LocalBackend, ServedModels]) -> Iterator[str]:
    with serve(backend) as url:
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Browser:
    browser.requested.clear()
    browser.console.clear()
    browser.open(f"{url}/")
    browser.wait_for(f"{STATUS} === 'Ready'")
    return browser


def text(page: Browser, selector: str) -> str:
    return page.evaluate(f"document.querySelector({selector!r}).textContent")


def set_value(page: Browser, selector: str, value: object) -> None:
    page.evaluate(
        f"{{const e = document.querySelector({selector!r}); e.value = {str(value)!r};"
        "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'))}"
    )


def test_a_prompt_is_drawn_by_both_models_and_judged_with_the_keyboard_alone(page: Browser, url: str) -> None:
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.press("a", modifiers=2)
    page.type("two blue bananas to the left of a red car")
    page.press("Enter", modifiers=2)
    page.wait_for("document.querySelector('#right progress').value > 0")
    page.wait_for(ENDED)
    assert text(page, "#status") == "Done", text(page, "#error")
    sources = page.evaluate("[...document.images].map((image) => image.src)")
    # The merged model here is the base itself: from one seed both draw one image.
    assert sources[0].startswith("data:image/png;base64,")
    assert sources[0] == sources[1]
    assert "two blue bananas" in page.evaluate("document.images[0].alt")
    assert text(page, "#left .verdict").split("%")[0].isdigit()
    questions = page.evaluate("[...document.querySelectorAll('#answers tbody th')].map((cell) => cell.textContent)")
    assert "Is there a car?" in questions
    assert text(page, "#judge-note").startswith("No answers differ. Answers are those of miniature@")
    assert text(page, "#right .latency").endswith(" s")
    assert {urlparse(address).netloc for address in page.requested if not address.startswith("data:")} == {
        urlparse(url).netloc
    }
    assert page.console == []


def test_a_mix_of_experts_is_set_with_sliders(page: Browser) -> None:
    assert page.evaluate("document.getElementById('mix').hidden")
    set_value(page, "#right select", "mix of experts")
    assert not page.evaluate("document.getElementById('mix').hidden")
    page.evaluate("document.querySelector('#sliders input').focus()")
    before = page.evaluate("document.activeElement.value")
    page.press("ArrowRight")
    assert float(page.evaluate("document.activeElement.value")) == pytest.approx(float(before) + 0.05)
    page.evaluate("document.getElementById('generate').click()")
    page.wait_for(ENDED)
    assert text(page, "#status") == "Done", text(page, "#error")
    sources = page.evaluate("[...document.images].map((image) => image.src)")
    assert sources[0] != sources[1]
    assert text(page, "thead .answer:last-child") == "mix of experts"


def test_what_is_refused_is_shown_and_what_has_no_questions_is_drawn(page: Browser) -> None:
    set_value(page, "#steps", 5000)
    page.press("Enter", modifiers=2)
    page.wait_for(ENDED)
    assert "num_inference_steps must be at most 1000" in text(page, "#error")
    set_value(page, "#steps", 2)
    set_value(page, "#prompt", "democracy")
    page.press("Enter", modifiers=2)
    page.wait_for(f"{STATUS} === 'Drawn, not scored'")
    assert page.evaluate("document.getElementById('error').hidden")
    assert "No score for this prompt" in text(page, "#judge-note")


def test_drawing_can_be_stopped(page: Browser, backend: tuple[LocalBackend, ServedModels]) -> None:
    set_value(page, "#steps", 900)
    page.press("Enter", modifiers=2)
    page.wait_for("document.querySelector('#left img').hidden === false || document.activeElement !== null")
    page.wait_for("!document.getElementById('stop').hidden")
    page.press("Escape")
    page.wait_for(f"{STATUS} === 'Stopped'")
    assert not page.evaluate("document.getElementById('generate').hidden")


def test_every_control_has_a_name_and_is_reached_with_tab(page: Browser) -> None:
    set_value(page, "#right select", "mix of experts")
    controls = "[...document.querySelectorAll('input, textarea, select, button')].filter((e) => e.offsetParent)"
    unnamed = f"{controls}.filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map((e) => e.id)"
    assert page.evaluate(unnamed) == []
    reached = set()
    for _ in range(page.evaluate(f"{controls}.length") + 1):  # one more: on its way round the focus leaves the page
        page.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel"))
    assert reached - {None} == set(page.evaluate(f"{controls}.map((e) => e.id || e.ariaLabel)"))


@pytest.mark.parametrize("dark", [False, True])
def test_it_follows_the_colour_scheme_and_fits_a_narrow_window(page: Browser, tmp_path: Path, dark: bool) -> None:
    page.look(390, 800, dark)
    page.screenshot(tmp_path / "page.png")
    corner = Image.open(tmp_path / "page.png").convert("L").getpixel((1, 1))
    assert corner < 60 if dark else corner > 200
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.look(980, 1200)


def test_a_key_is_asked_for_where_there_are_any(
    browser: Browser, backend: tuple[LocalBackend, ServedModels], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(KEY)
    with serve(backend, read_keys(tmp_path / "keys")) as url:
        browser.open(f"{url}/")
        browser.wait_for("document.getElementById('key-field')?.hidden === false")
        assert browser.evaluate("document.activeElement.id") == "key"
        set_value(browser, "#key", KEY)
        browser.wait_for(f"{STATUS} === 'Ready'")
        browser.evaluate("document.getElementById('generate').click()")
        browser.wait_for(ENDED)
        assert text(browser, "#status") == "Done", text(browser, "#error")

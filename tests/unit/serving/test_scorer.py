"""The evaluator's scores are those of offline evaluation, for a judge and for models of their own."""

import base64
import io
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from selma_ray.config import validate
from selma_ray.errors import CaptionError, ConfigError, ModelNotFoundError
from selma_ray.judging.config import JudgeConfig
from selma_ray.judging.judges.opening import open_judge
from selma_ray.judging.metrics import ANSWER_METRICS, MODEL_METRICS, PROMPT_METRICS, open_metric
from selma_ray.judging.preferences.convert import clip_from_open_clip, image_reward_from_release
from selma_ray.judging.questions import Question
from selma_ray.judging.scoring import score_images
from selma_ray.judging.sources import GrammarQuestions, grammar_questions
from selma_ray.serving.api import build_app
from selma_ray.serving.config import JUDGE_METRICS, ModelMetric, ServingConfig
from selma_ray.serving.encoding import PNG, decode_upload, encode
from selma_ray.serving.errors import RequestError
from selma_ray.serving.evaluator import Asked, prepare
from selma_ray.serving.scorer import ServiceScorer, open_scorer, scorer_of
from selma_ray.serving.served import ModelNames
from tests.local_service import LocalBackend
from tests.unit.judging import tiny_preferences as tiny
from tests.unit.judging.tiny_judges import save_tiny_vilt

PROMPT = "two blue bananas to the left of a red car"
TOLERANCE = 1e-4  # the same model in another batch differs in its last bits


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return folders of small random checkpoints, by metric."""
    folder = tmp_path_factory.mktemp("models")
    letters, words = tiny.character_tokenizer(folder / "letters"), tiny.word_tokenizer(folder / "words")
    clip = clip_from_open_clip(tiny.open_clip_weights(len(letters)), tiny.clip_config(letters))
    reward = image_reward_from_release(tiny.release_weights(len(words)), tiny.image_reward_config(len(words)))
    for name, model, tokenizer in (("clip", clip, letters), ("reward", reward, words)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / ("reward" if name == "imagereward" else "clip")) for name in MODEL_METRICS}


@pytest.fixture(scope="module", params=["miniature", "vilt"])
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return "miniature" if request.param == "miniature" else str(save_tiny_vilt(tmp_path_factory.mktemp("vilt")))


@pytest.fixture(scope="module")
def scorer(judge: str, models: dict[str, str]) -> ServiceScorer:
    return open_scorer(JudgeConfig(name=judge), models, GrammarQuestions())  # type: ignore[arg-type]


def noise(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


def client_of(scorer: ServiceScorer, **config: Any) -> TestClient:
    app = build_app(LocalBackend(None, scorer), ServingConfig(**config), ModelNames("merged"), ())
    return TestClient(app, "http://127.0.0.1:8000", client=("127.0.0.1", 50000), raise_server_exceptions=False)


def base64_png(image: Image.Image) -> str:
    return base64.b64encode(encode(image, PNG)).decode()


def test_every_online_score_equals_the_offline_one(scorer: ServiceScorer, judge: str, models: dict[str, str]) -> None:
    images = noise(3)
    questions = grammar_questions(PROMPT)
    opened = open_judge(JudgeConfig(name=judge))
    assert scorer.metrics == (*JUDGE_METRICS, *models)
    client = client_of(scorer, judge=judge, score_models=models)
    body = {"prompt": PROMPT, "images": [base64_png(image) for image in images], "metrics": list(scorer.metrics)}
    online = client.post("/v1/scores", json=body).json()["data"]
    for name in scorer.metrics:
        metric = open_metric(name, opened, models.get(name))
        offline = metric.score(images, [PROMPT] * 3, [questions] * 3)
        assert [each["scores"][name] for each in online] == pytest.approx(
            [score.value for score in offline], abs=TOLERANCE
        )
    wanted = score_images(opened, images, [questions] * 3)
    for mine, theirs in zip(online, wanted, strict=True):
        assert [each["answer"] for each in mine["questions"]] == [each.answer for each in theirs.questions]
        assert [each["counted"] for each in mine["questions"]] == [each.counted for each in theirs.questions]
        assert not mine["reasons"]


def test_scores_depend_neither_on_the_batch_nor_on_what_else_is_asked(scorer: ServiceScorer) -> None:
    images = noise(4)
    wants = [("dsg",), ("vqascore", "clipscore"), scorer.metrics, ("imagereward",)]
    asked = [
        Asked(image, PROMPT, want, scorer.questions(PROMPT) if set(want) & scorer.metrics_of_questions else ())
        for image, want in zip(images, wants, strict=True)
    ]
    together = scorer.score(asked)
    for each, judged in zip(asked, together, strict=True):
        (alone,) = scorer.score([each])
        assert set(each.metrics) <= judged.scores.keys()
        assert judged.scores == pytest.approx(alone.scores, abs=TOLERANCE)
        assert bool(judged.questions) == bool(each.questions)


def test_scores_without_questions_take_any_prompt_and_those_with_questions_name_what_they_miss(
    scorer: ServiceScorer,
) -> None:
    client = client_of(scorer, score_models={"clipscore": "x", "imagereward": "x"})
    body = {"prompt": "democracy", "image": base64_png(noise(1)[0])}
    answer = client.post("/v1/scores", json=body | {"metrics": ["vqascore", "clipscore", "imagereward"]})
    assert answer.status_code == 200
    assert answer.json()["data"][0]["questions"] == []
    assert all(isinstance(score, float) for score in answer.json()["data"][0]["scores"].values())
    for metrics in (["dsg"], ["clipscore", "soft_dsg"], None):
        answer = client.post("/v1/scores", json=body | {"metrics": metrics})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "unsupported_caption")
    with pytest.raises(CaptionError, match="democracy"):
        scorer.questions("democracy")


def test_questions_that_are_sent_are_asked_of_any_prompt(scorer: ServiceScorer) -> None:
    client = client_of(scorer)
    (image,) = noise(1)
    questions = [
        {"id": 1, "question": "Is there a car?"},
        {"id": 2, "question": "Is the car red?", "category": "color", "parents": [1]},
    ]
    body = {"prompt": "democracy", "image": base64_png(image), "questions": questions, "metrics": ["dsg", "soft_dsg"]}
    (found,) = client.post("/v1/scores", json=body).json()["data"]
    asked = [Question(1, "question", "Is there a car?"), Question(2, "color", "Is the car red?", (1,))]
    (wanted,) = score_images(scorer._judge, [image], [asked])
    assert found["scores"]["dsg"] == wanted.score
    assert [(each["id"], each["parents"]) for each in found["questions"]] == [(1, []), (2, [1])]
    for wrong in ({"parents": [3]}, {"id": 1}, {"parents": [2]}):
        answer = client.post("/v1/scores", json=body | {"questions": [questions[0], questions[1] | wrong]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "questions")
        assert answer.json()["error"]["message"].startswith("questions: ")


def test_cost_counts_what_models_are_asked(scorer: ServiceScorer) -> None:
    image = encode(noise(1)[0], PNG)
    count = len(grammar_questions(PROMPT))

    def cost(*metrics: str) -> int:
        (asked,) = prepare(scorer, PROMPT, [image], metrics, 10**6)
        return asked.cost

    assert cost("dsg") == cost("dsg", "soft_dsg", "dsg_selma") == count
    assert cost("vqascore") == 1
    assert cost("dsg", "vqascore", "clipscore") == count + 2


def test_a_metric_that_is_not_configured_is_refused_with_the_names_of_those_that_are(models: dict[str, str]) -> None:
    scorer = open_scorer(None, {"clipscore": models["clipscore"]}, GrammarQuestions())
    client = client_of(scorer, judge=None, score_models={"clipscore": models["clipscore"]})
    image = base64_png(noise(1)[0])
    for path, body, param in (
        ("/v1/scores", {"image": image, "metrics": ["clipscore", "dsg"]}, "metrics"),
        ("/v1/scores", {"image": image, "metrics": ["x" * 64]}, "metrics"),
        ("/v1/images/generations", {"best_of": 2, "metric": "dsg"}, "metric"),
    ):
        answer = client.post(path, json={"prompt": PROMPT} | body)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert error["code"] == "metric_not_served"
        assert error["message"].endswith("served are clipscore")
    # Without a name it is the first that is served.
    answer = client.post("/v1/scores", json={"prompt": PROMPT, "image": image}).json()
    assert (answer["judge"], list(answer["data"][0]["scores"])) == (None, ["clipscore"])
    # The evaluator refuses it as well, whoever asks.
    with pytest.raises(RequestError, match="served are clipscore"):
        prepare(scorer, PROMPT, [], ["dsg"], 1)


def test_a_service_without_an_evaluator_says_so() -> None:
    client = client_of(open_scorer(None, {}, GrammarQuestions()), evaluator_replicas=0)
    for path, body in (("/v1/scores", {"image": "aaaa"}), ("/v1/images/generations", {"best_of": 2})):
        answer = client.post(path, json={"prompt": PROMPT} | body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "scores_not_served")


def test_a_score_that_cannot_be_given_is_null_with_its_reason(models: dict[str, str]) -> None:
    class Broken:
        name = "broken@1"

        def answer(self, images: Any, questions: Any, choices: Any = None) -> None:
            raise RuntimeError("the judge is out of order")

    scorer = ServiceScorer(
        Broken(), {"clipscore": open_metric("clipscore", model=models["clipscore"])}, GrammarQuestions()
    )
    client = client_of(scorer, score_models={"clipscore": "x"})
    body = {"prompt": PROMPT, "image": base64_png(noise(1)[0]), "metrics": ["dsg", "vqascore", "clipscore"]}
    (found,) = client.post("/v1/scores", json=body).json()["data"]
    assert found["scores"]["dsg"] is None
    assert found["scores"]["vqascore"] is None
    assert found["scores"]["clipscore"] is not None
    assert found["reasons"] == {"vqascore": "RuntimeError: the judge is out of order"}
    assert {each["reason"] for each in found["questions"]} == {"RuntimeError: the judge is out of order"}


def test_the_judges_name_shows_no_folder(tmp_path: Path) -> None:
    scorer = open_scorer(JudgeConfig(name=str(save_tiny_vilt(tmp_path / "my-judge"))), {}, GrammarQuestions())
    assert scorer.judge is not None
    assert scorer.judge.startswith("my-judge@")


def test_names_of_scores_are_those_of_evaluation() -> None:
    # TIFA has questions of its own: asked DSG's, it would be another score under its name.
    assert set(JUDGE_METRICS) == {*ANSWER_METRICS, *PROMPT_METRICS} - {"tifa"}
    assert get_args(ModelMetric) == MODEL_METRICS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"score_models": {"clipscor": "x"}}, r"score_models.clipscor.*'clipscore'"),
        ({"score_models": {"clipscore": ""}}, "score_models.clipscore string should have at least 1 character"),
        ({"judge": None}, "evaluator_replicas must be 0 where neither judge nor score_models is given"),
    ],
)
def test_configurations_that_cannot_score_are_named(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ServingConfig, config, "recipe")


def test_models_of_scores_that_are_missing_are_named_before_any_replica_starts() -> None:
    for config in ({"judge": "/nowhere"}, {"score_models": {"pickscore": "/nowhere"}}):
        with pytest.raises(ModelNotFoundError, match="/nowhere"):
            scorer_of(ServingConfig(**config), GrammarQuestions())
        scorer_of(ServingConfig(evaluator_replicas=0, **config), GrammarQuestions())


def test_an_upload_is_the_image_that_was_drawn() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(decode_upload(encode(image, PNG), 256)), np.asarray(image))
    assert Image.open(io.BytesIO(encode(image, PNG))).mode == "RGB"

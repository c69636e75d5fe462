"""What goes to an engine and what comes back; no engine is started."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import ConfigError, LLMError, ModelNotFoundError
from selma_ray.prompts import remote, vllm_engine
from selma_ray.prompts.config import LLMConfig, PromptsConfig, RemoteConfig
from selma_ray.prompts.llm import check_llm, llm_errors
from selma_ray.prompts.requests import request_text
from selma_ray.prompts.sampling import RequestSampling
from selma_ray.skills import Skill, SkillSampling

PLAIN = Skill(name="plain", description="things", max_words=9, seeds=("a cat",))
STRICT = Skill(
    name="strict", description="things", max_words=9, seeds=("a cat",), grammar='caption ::= "a cat" | "a dog"',
    sampling=SkillSampling(temperature=0.5, top_k=40, max_tokens=64),
)  # fmt: skip
CONFIG = PromptsConfig(per_request=3, llm=LLMConfig(name="writer", temperature=0.9))


def request(skill: Skill) -> dict:
    text = request_text(skill, ["a cat", "two dogs"], 3)
    return {"skill": skill.name, "request": 5, "seed": 7, "text": text, "first_number": 3}


def test_a_skills_sampling_goes_before_the_recipes() -> None:
    sampling = RequestSampling([PLAIN, STRICT], CONFIG, chat=False)
    plain, strict = sampling.of(request(PLAIN)), sampling.of(request(STRICT))
    assert (plain["temperature"], strict["temperature"]) == (0.9, 0.5)
    assert (sampling.max_tokens("plain"), sampling.max_tokens("strict")) == (1024, 64)
    assert plain["seed"] == 7
    assert plain["stop"] == ["\n6."]
    assert strict["structured_outputs"]["grammar"].startswith(r'root ::= " " caption "\n4. " caption "\n5. " caption')
    # Rows of one block share their keys: what one skill alone sets is neutral for the other.
    assert (plain["top_k"], strict["top_k"]) == (0, 40)
    assert "min_p" not in plain


def test_a_chat_model_is_sent_a_message_and_numbers_its_answer_from_the_first() -> None:
    asked = vllm_engine._Preprocess([PLAIN, STRICT], CONFIG, chat=True)(request(STRICT))
    (message,) = asked["messages"]
    assert message["role"] == "user"
    assert "\n2. two dogs\n\nGo on with this list from 3 to 5" in message["content"]
    assert asked["sampling_params"]["structured_outputs"]["grammar"].startswith('root ::= "3. " caption')
    row = {"skill": "strict", "request": 5, "generated_text": "3. a cat", "num_generated_tokens": 64}
    answer = vllm_engine._Postprocess([STRICT], CONFIG, chat=True)(row)
    assert answer == {"skill": "strict", "request": 5, "answer": "\n3. a cat", "truncated": True}


class _Engine:
    def __init__(self, data_column: str, *, model: str, batch_size: int) -> None:
        self.given = (data_column, model, batch_size)


def test_an_engine_looks_for_its_model_on_its_own_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import cloudpickle

    stage = vllm_engine._finding_its_model(_Engine, "miniature", None)
    home = tmp_path / "selma_ray" / "smollm2-135m-instruct"  # of a node on which it was unpacked
    home.mkdir(parents=True)
    (home / "config.json").write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    there = cloudpickle.loads(cloudpickle.dumps(stage))
    assert there("rows", model="/driver/home/smollm2", batch_size=2).given == ("rows", str(home), 2)
    assert there.__name__ == "_Engine"


def test_a_base_model_completes_the_list() -> None:
    asked = vllm_engine._Preprocess([PLAIN], CONFIG, chat=False)(request(PLAIN))
    assert asked["prompt"].endswith("\n2. two dogs\n3.")
    row = {"skill": "plain", "request": 5, "generated_text": " a cat", "num_generated_tokens": 64}
    answer = vllm_engine._Postprocess([PLAIN], CONFIG, chat=False)(row)
    assert answer == {"skill": "plain", "request": 5, "answer": " a cat", "truncated": False}


@pytest.mark.parametrize(
    ("options", "has_template", "expected"),
    [({}, True, True), ({}, False, False), ({"chat": False}, True, False), ({"chat_template": "x"}, False, True)],
)
def test_the_tokenizer_says_whether_a_model_chats(
    monkeypatch: pytest.MonkeyPatch, options: Any, has_template: bool, expected: bool
) -> None:
    import transformers

    class Tokenizer:
        chat_template = "{{ messages }}" if has_template else None

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Tokenizer())
    assert vllm_engine.speaks_chat(LLMConfig(**options), "model") is expected
    if not has_template:
        with pytest.raises(ConfigError, match=r"no chat template; set prompts.llm.chat_template"):
            vllm_engine.speaks_chat(LLMConfig(chat=True), "model")


def test_a_tokenizer_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"the tokenizer of prompts.llm.name writer cannot be loaded \(.*\); fix"
    ):
        vllm_engine.speaks_chat(LLMConfig(name="writer"), str(tmp_path))


def test_a_chat_template_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"chat_template .*nowhere.jinja cannot be read"):
        check_llm(LLMConfig(name=str(tmp_path), chat_template="nowhere.jinja"))


def test_the_workers_of_a_split_model_stand_on_the_nodes_of_their_role(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    made = []

    class Group:
        pass

    monkeypatch.setattr(
        ray.util,
        "placement_group",
        lambda bundles, **options: made.append((bundles, options)) or Group(),  # type: ignore[func-returns-value]
    )
    bundles = [{"CPU": 1, "GPU": 1}] * 2
    removed: list[Any] = []
    monkeypatch.setattr(ray.util, "remove_placement_group", removed.append)
    options = vllm_engine._place_workers(bundles, {"label_selector": {"role": "llm"}}, "STRICT_PACK")  # type: ignore[arg-type]
    assert made == [(bundles, {"strategy": "STRICT_PACK", "bundle_label_selector": [{"role": "llm"}] * 2})]
    assert options["scheduling_strategy"].placement_group_capture_child_tasks
    vllm_engine._place_workers(bundles, {}, "PACK")  # type: ignore[arg-type]
    assert made[1][1]["bundle_label_selector"] is None
    vllm_engine.release_engines()
    vllm_engine.release_engines()
    assert len(removed) == 2, "each group is given back once"


def test_a_remote_request_is_what_openais_api_takes() -> None:
    chat = remote._Preprocess([PLAIN, STRICT], CONFIG, chat=True)(request(PLAIN))["payload"]
    assert chat["model"] == "writer"
    assert chat["messages"][0]["content"].endswith("Answer with the list alone.")
    assert chat["chat_template_kwargs"]["enable_thinking"] is False
    text = remote._Preprocess([PLAIN, STRICT], CONFIG, chat=False)(request(STRICT))["payload"]
    assert text["prompt"].endswith("\n3.")
    assert "structured_outputs" in text
    without = CONFIG.model_copy(update={"llm": LLMConfig(remote=RemoteConfig(grammars=False))})
    payload = remote._Preprocess([STRICT], without, chat=False)(request(STRICT))["payload"]
    assert "chat_template_kwargs" not in payload
    openai = CONFIG.model_copy(update={"llm": LLMConfig(remote=RemoteConfig(chat_template_kwargs={}))})
    assert "chat_template_kwargs" not in remote._Preprocess([PLAIN], openai, chat=True)(request(PLAIN))["payload"]
    assert "structured_outputs" not in payload


@pytest.mark.parametrize(
    ("chat", "choice", "answer", "truncated"),
    [
        (True, {"message": {"content": "3. a cat"}, "finish_reason": "stop"}, "\n3. a cat", False),
        (True, {"message": {"content": None}, "finish_reason": "length"}, "\n", True),
        (False, {"text": " a cat", "finish_reason": "length"}, " a cat", True),
    ],
)
def test_a_remote_answer_is_read(chat: bool, choice: Any, answer: str, truncated: bool) -> None:
    row = {"skill": "plain", "request": 5, "http_response": {"choices": [choice]}}
    result = remote._Postprocess("http://host/v1", chat)(row)
    assert (result["answer"], result["truncated"]) == (answer, truncated)


@pytest.mark.parametrize(
    "response",
    [
        {"error": {"message": "no such\nmodel"}},
        {"message": "no such model", "object": "error"},
        {"error": "no such model"},
    ],
)
def test_a_refusal_is_one_line(response: Any) -> None:
    row = {"skill": "plain", "request": 5, "http_response": response}
    with pytest.raises(LLMError, match=r"http://host/v1 refused a request: .*no such.* model"[:50]):
        remote._Postprocess("http://host/v1", True)(row)


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLMConfig(engine="remote", remote=RemoteConfig(api_key_env="SELMA_TEST_KEY"))
    monkeypatch.delenv("SELMA_TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match="SELMA_TEST_KEY, which is not set; export it"):
        check_llm(llm)
    monkeypatch.setenv("SELMA_TEST_KEY", "sk-secret")
    check_llm(llm)
    session = remote._OpenSession("SELMA_TEST_KEY", 5)
    assert "sk-secret" not in repr(session)
    assert pickle.loads(pickle.dumps(session))._key == "sk-secret"
    assert "sk-secret" not in llm.model_dump_json()


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ("The actor died unexpectedly.\n\tclass_name: MapWorker(MapBatches(vLLMEngineStageUDF))", "max_restarts=5"),
        (
            "The actor died because of an error raised in its creation task, ray::MapWorker(MapBatches(vLLMEngineStageUDF))"
            "\n  File vllm.py\nValueError: no memory for the cache",
            "cannot start: ValueError: no memory for the cache; fix",
        ),
        ("RuntimeError: Reached maximum retries of 6 for input row", "did not answer a request that was tried 7 times"),
        (
            "UDF failed to process a data block.\nTraceback\nselma_ray.errors.LLMError: the server refused a request; fix the key",
            "^the server refused a request; fix the key$",
        ),
    ],
)
def test_failures_of_the_language_model_are_explained(message: str, match: str) -> None:
    with pytest.raises(LLMError, match=match), llm_errors(LLMConfig()):
        raise RuntimeError(message)


def test_a_failure_that_another_was_raised_from_is_explained() -> None:
    cause = RuntimeError("The actor died unexpectedly.\n\tclass_name: MapWorker(MapBatches(vLLMEngineStageUDF))")
    with pytest.raises(LLMError, match="max_restarts=5"), llm_errors(LLMConfig()):
        raise RuntimeError("the stream failed") from cause


def test_other_failures_pass() -> None:
    with pytest.raises(RuntimeError, match="renderer"), llm_errors(LLMConfig()):
        raise RuntimeError("The actor died: class_name: MapWorker(RenderPrompts), a renderer")


def test_replicas_are_in_order() -> None:
    with pytest.raises(ValueError, match="max_replicas must be at least min_replicas=3, got 2"):
        LLMConfig(min_replicas=3, max_replicas=2)


def test_a_bound_on_requests_that_cannot_fill_a_skill_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_requests=4 .* cannot fill per_skill=100; .*several times 10"):
        PromptsConfig(per_skill=100, per_request=10, max_requests=4)

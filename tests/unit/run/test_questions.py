"""Which questions a run's captions are asked, and when a language model writes them."""

import threading
from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import ConfigError, LLMError
from selma_ray.judging.sources import WHOLE
from selma_ray.judging.writing.written import WrittenQuestions
from selma_ray.prompts.store import read_prompts
from selma_ray.run.question_source import check_questions_can_be_had, source_name, splits_judged, writer_of
from selma_ray.run.questions import open_source, question_counts, questions_beside
from tests.unit.run.miniature_runs import run_with_captions

WRITTEN = {"questions": {"source": "written", "writer": {"llm": {"name": "miniature"}}}}
CHOICE = {"images": {"per_prompt": 2, "selection": {}}}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def make(**recipe: Any) -> Any:
        return run_with_captions(tmp_path, ["common"], per_skill=4, dev_fraction=0.25, **recipe)

    return make


@pytest.fixture
def llm_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the miniature's language model, which takes a minute to unpack; it is never loaded here."""
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text("{}")
    monkeypatch.setattr("selma_ray.models.locate.llm_dir", lambda: tmp_path / "llm")


def test_the_grammar_asks_about_the_miniature_and_a_language_model_about_everything_else(
    run: Any, tiny_pipeline_dir: Path
) -> None:
    assert source_name(run().recipe) == "grammar"
    assert source_name(run(model={"name": "miniature-weak"}).recipe) == "grammar"
    assert source_name(run(model={"name": str(tiny_pipeline_dir)}).recipe) == "written"
    assert source_name(run(questions={"source": "whole"}).recipe) == "whole"


@pytest.mark.parametrize(
    ("recipe", "splits"),
    [
        ({}, ()),
        (CHOICE, ("train",)),
        (CHOICE | {"data": {"images": "ground_truth"}}, ()),
        ({"experts": {"selection": {"every_steps": 1}}}, ("dev",)),
        ({"experts": {"selection": {"every_steps": 1, "suite": "dev.jsonl"}}}, ()),
        (CHOICE | {"merging": {"method": "search"}}, ("train", "dev")),
    ],
)
def test_questions_are_needed_where_a_run_judges_its_own_prompts(run: Any, recipe: Any, splits: Any) -> None:
    assert splits_judged(run(**recipe).recipe) == splits


def test_the_model_that_writes_prompts_writes_questions_unless_another_is_named(run: Any) -> None:
    llm = {"name": "big", "num_gpus": 1, "max_replicas": 3, "dtype": "bfloat16"}
    writer = writer_of(run(prompts={"per_skill": 4, "dev_fraction": 0.25, "llm": llm}).recipe).llm
    assert (writer.name, writer.num_gpus, writer.replicas, writer.dtype) == ("big", 1, 3, "bfloat16")
    assert writer_of(run(**WRITTEN).recipe).llm.name == "miniature"
    remote = {"per_skill": 4, "llm": {"engine": "remote"}}
    with pytest.raises(ConfigError, match=r"questions\.writer\.llm must name a language model for vLLM where"):
        check_questions_can_be_had(run(prompts=remote, **CHOICE, questions={"source": "written"}).recipe)
    check_questions_can_be_had(run(prompts=remote, questions={"source": "written"}).recipe)


def test_counts_say_which_prompts_have_no_questions_of_their_own(run: Any) -> None:
    made = run(**CHOICE)
    assert question_counts(made) == {"source": "grammar", "prompts": 3, "whole": 0, "failures": {}}
    candidate = {"text": "a zeppelin over Lisbon", "index": 4, "split": "train"}
    made.folder.write_json(
        {"skill": "common", "request": 1, "candidates": [candidate]}, "prompts/common/request-000001.json"
    )
    counts = question_counts(made)
    assert (counts["prompts"], counts["whole"]) == (4, 1)
    assert "zeppelin" in next(iter(counts["failures"]))
    assert [each.category for each in open_source(made).questions("a zeppelin over Lisbon")] == [WHOLE]
    assert question_counts(run()) is None


@pytest.mark.usefixtures("llm_dir")
def test_written_questions_are_asked_and_what_failed_is_counted(run: Any) -> None:
    made = run(**CHOICE, **WRITTEN)
    prompts = [row["prompt"] for row in read_prompts(made.folder, "common", "train").to_pylist()]
    question = {"id": 1, "category": "whole", "question": "is it?", "parents": [0], "choices": [], "answer": "yes"}
    lines = [{"prompt": prompt, "repaired": {}, "questions": [question]} for prompt in prompts[1:]]
    failed = {"prompt": prompts[0], "repaired": {"line": 1}, "failure": "no answer could be read", "attempts": {}}
    WrittenQuestions(made.folder, writer_of(made.recipe)).add([failed, *lines])
    counts = question_counts(made)
    assert (counts["written"], counts["failed"], counts["whole"]) == (2, 1, 1)
    assert (counts["failures"], counts["repaired"]) == ({"no answer could be read": 1}, {"line": 1})
    assert open_source(made).questions(prompts[1])[0].question == "is it?"
    assert open_source(made).questions(prompts[0])[0].category == WHOLE


@pytest.mark.usefixtures("llm_dir")
def test_questions_are_written_beside_the_renderers_and_waited_for(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrote = threading.Event()
    told: list[Any] = []
    monkeypatch.setattr("selma_ray.run.questions.write_questions", lambda run, report: wrote.set())
    with questions_beside(run(**CHOICE, **WRITTEN), told.append):
        assert wrote.wait(10), "they are written while the block runs"


@pytest.mark.usefixtures("llm_dir")
def test_a_failure_to_write_questions_is_the_stage_s(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Any, report: Any) -> None:
        raise LLMError("no memory")

    monkeypatch.setattr("selma_ray.run.questions.write_questions", fail)
    with pytest.raises(LLMError, match="no memory"), questions_beside(run(**CHOICE, **WRITTEN), lambda _: None):
        pass


def test_nothing_is_written_where_no_question_is_needed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selma_ray.run.questions.write_questions", lambda *_, **__: pytest.fail("nothing to write"))
    for made in (run(**CHOICE), run(**WRITTEN)):
        with questions_beside(made, lambda _: None):
            pass


def test_a_run_that_judges_none_of_its_prompts_serves_the_question_about_the_whole_prompt(run: Any) -> None:
    made = run(
        prompts={"per_skill": 4, "dev_fraction": 0.25, "llm": {"engine": "free"}}, questions={"source": "written"}
    )
    assert [each.category for each in open_source(made).questions("a dog")] == [WHOLE]

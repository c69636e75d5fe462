import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from selma_ray.errors import JudgeError
from selma_ray.judging.downloads import SuiteFile, fetch
from selma_ray.judging.dsg import SCORERS, Answered
from selma_ray.judging.suites import SUITES, open_suite, suite_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return suite_folder()


@pytest.fixture
def put(cache: Any) -> Any:
    """Return a function that lays a file of a suite into the cache."""

    def lay(suite: Any, name: Any, content: Any) -> None:
        (cache / suite).mkdir(parents=True, exist_ok=True)
        (cache / suite / name).write_bytes(content)

    return lay


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Any]:
    """Serve a folder on loopback; yields the folder and its address."""
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_dsg1k_has_every_prompt_and_scorable_questions(shared_eval: Path, put: Any) -> None:
    put("dsg1k", "dsg-1k-anns.csv", (shared_eval / "dsg" / "dsg-1k-anns.csv").read_bytes())
    suite = open_suite("dsg1k")
    assert len(suite) == 1060
    assert len({prompt.skill for prompt in suite}) == 10
    assert sum(len(prompt.questions) for prompt in suite) > 8000
    for prompt in suite:
        answers = [Answered(each.id, "yes", each.parents) for each in prompt.questions]
        for scorer in SCORERS.values():
            assert set(scorer(answers)) == {1.0}
    few = open_suite("dsg1k", 20)
    assert set(Counter(prompt.skill for prompt in few).values()) == {2}


def test_geneval_and_parti_ask_one_question_for_the_whole(shared_eval: Path, put: Any) -> None:
    prompts = shared_eval / "prompts"
    put("geneval", "evaluation_metadata.jsonl", (prompts / "geneval" / "evaluation_metadata.jsonl").read_bytes())
    put("parti", "PartiPrompts.tsv", (prompts / "parti" / "PartiPrompts.tsv").read_bytes())
    geneval, parti = open_suite("geneval"), open_suite("parti")
    assert len(geneval) == 553
    assert len({prompt.skill for prompt in geneval}) == 6
    assert len(parti) > 1600
    for prompt in (*geneval, *parti):
        (question,) = prompt.questions
        assert question.question == f'Does this figure show "{prompt.prompt}"? Please answer yes or no.'
    assert len({prompt.id for prompt in geneval}) == 553
    assert len({prompt.id for prompt in parti}) == len(parti)


def test_tifa_reads_the_released_format(shared_eval: Path, put: Any) -> None:
    sample = shared_eval / "tifa"
    put("tifa", "tifa_v1.0_text_inputs.json", (sample / "sample_text_inputs.json").read_bytes())
    put("tifa", "tifa_v1.0_question_answers.json", (sample / "sample_question_answers.json").read_bytes())
    suite = open_suite("tifa")
    assert [(prompt.id, prompt.skill) for prompt in suite] == [("coco_301091", "coco"), ("drawbench_52", "drawbench")]
    question = suite[0].questions[1]
    assert (question.question, question.answer) == ("who is on the beach?", "surfer")
    assert question.choices == ("surfer", "swimmer", "diver", "skier")
    assert [each.id for each in suite[0].questions] == list(range(1, len(suite[0].questions) + 1))


def test_a_file_is_downloaded_once(site: Any, tmp_path: Path) -> None:
    folder, address = site
    (folder / "a.csv").write_text("content")
    file = SuiteFile("a.csv", f"{address}/a.csv", hashlib.sha256(b"content").hexdigest(), max_bytes=7)
    path = fetch(file, tmp_path / "x", "some")
    (folder / "a.csv").unlink()
    assert fetch(file, tmp_path / "x", "some") == path
    assert path.read_text() == "content"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sha256": "0" * 64}, r"does not match the known hash: expected sha256:0{64} but got"),
        ({"max_bytes": 6}, r"larger than 6 bytes"),
        ({"name": "gone.csv"}, r"cannot be downloaded \(404 .*\); on a closed network put the published file into"),
    ],
)
def test_a_bad_download_is_one_line_and_leaves_nothing(site: Any, tmp_path: Path, changes: Any, expected: str) -> None:
    folder, address = site
    (folder / "a.csv").write_text("content")
    name = changes.get("name", "a.csv")
    with pytest.raises(JudgeError, match=expected) as caught:
        fetch(SuiteFile(**{"name": name, "url": f"{address}/{name}", **changes}), tmp_path / "x", "some")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "x").iterdir())


def test_offline_says_where_the_file_belongs(tmp_path: Path, cache: Any) -> None:
    closed = SuiteFile("a.csv", "http://127.0.0.1:9/a.csv")
    with pytest.raises(JudgeError, match=rf"evaluation.suite some needs a.csv.*put the published file into {cache}"):
        fetch(closed, cache, "some")


def test_a_torn_file_in_the_cache_is_named(put: Any) -> None:
    put("dsg1k", "dsg-1k-anns.csv", b"item_id,text\n")
    with pytest.raises(JudgeError, match=r"dsg-1k-anns\.csv has sha256"):
        open_suite("dsg1k")
    put("tifa", "tifa_v1.0_text_inputs.json", b"[{}]")
    put("tifa", "tifa_v1.0_question_answers.json", b'[{"id": "a"}]')
    with pytest.raises(JudgeError, match=r"is not in its format \(KeyError 'choices'\); delete it"):
        open_suite("tifa")


def test_every_download_is_bounded_and_over_https() -> None:
    for suite in SUITES.values():
        for file in suite.files:
            assert file.url.startswith("https://")
            assert file.max_bytes <= 64 << 20


def test_the_miniature_and_files_are_suites_too(tmp_path: Path) -> None:
    assert len(open_suite("miniature", 10)) == 10
    with pytest.raises(JudgeError, match=r"nowhere\.jsonl cannot be read"):
        open_suite(str(tmp_path / "nowhere.jsonl"))

"""Published rules over what other programs saw: files of detections, answers and rankings, one JSON object a line.

    rules            a line of the file
    geneval          metadata (of evaluation_metadata.jsonl), detections {class: [[x0, y0, x1, y1, confidence]]}, colors {class: [colour]}
    t2i_spatial      locality, first and second: [x0, y0, x1, y1, confidence], or null where nothing was found
    t2i_numeracy     expected {class: count}, counted {class: count}
    t2i_attributes   p_yes: [P(yes) of each noun phrase's question, or null]
    tifa             id, element_type, question, choices, answer (the right one), given (the judge's, in its own words, or null)
    pickscore        label (1: people prefer the first image, 0: the second, 0.5: neither), probabilities: [first, second]
    imagereward      ranks (1 is the best) and rewards of a prompt's images
    hpsv2            gold and predicted: two rankings of a prompt's images
    dsg              no JSON Lines: a released *_dsg.csv, scored with `annotations`, the dsg-1k-anns.csv

pickscore, imagereward and hpsv2 are agreements of scores with people, each as its release counts it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from selma_ray.config import StrictModel
from selma_ray.errors import ConfigError, JudgeError
from selma_ray.json_lines import numbered_lines, parse_json
from selma_ray.judging import geneval, t2i_compbench
from selma_ray.judging.dsg import SCORERS, mean_score, overall_score
from selma_ray.judging.dsg1k import complete, read_answers, read_parents
from selma_ray.judging.preferences import agreement
from selma_ray.judging.questions import Question
from selma_ray.judging.tifa import summarise_tifa, tifa

__all__ = ["RULES", "ScoreFileConfig", "score_file"]

Rules = Literal[
    "dsg",
    "geneval",
    "hpsv2",
    "imagereward",
    "pickscore",
    "t2i_attributes",
    "t2i_numeracy",
    "t2i_spatial",
    "tifa",
]
_Box = tuple[float, float, float, float, float]
_Row = TypeVar("_Row", bound=BaseModel)


class ScoreFileConfig(StrictModel):
    """By which rules a file is scored."""

    rules: Rules
    """The published rules, which say what a line of the file holds."""
    max_overlap: float = Field(default=1.0, gt=0, le=1)
    """geneval: of two detections of a class that overlap by this IoU the less confident is dropped; 1 drops none, as the release."""
    annotations: Path | None = None
    """dsg: the dsg-1k-anns.csv whose questions were answered."""
    scorer: Literal["official", "dpg", "selma"] = "official"
    """dsg: how a question's parents count."""
    embedder: str | None = None
    """tifa: a sentence-transformers model that finds the choice nearest to an answer in other words."""
    tie_threshold: float = Field(default=0.0, ge=0)
    """pickscore: probabilities that differ by no more are a tie."""


class _GenEvalRow(BaseModel):
    metadata: dict[str, Any]
    detections: dict[str, list[_Box]]
    colors: dict[str, list[str | None]] = {}


class _SpatialRow(BaseModel):
    locality: str
    first: _Box | None
    second: _Box | None


class _NumeracyRow(BaseModel):
    expected: dict[str, int]
    counted: dict[str, int]


class _AttributesRow(BaseModel):
    p_yes: list[float | None]


class _TifaRow(BaseModel):
    id: str
    element_type: str
    question: str
    choices: tuple[str, ...]
    answer: str
    given: str | None


class _PickScoreRow(BaseModel):
    label: float = Field(ge=0, le=1, multiple_of=0.5)
    probabilities: tuple[float, float]


class _ImageRewardRow(BaseModel):
    ranks: list[int]
    rewards: list[float]


class _RankingsRow(BaseModel):
    gold: list[int]
    predicted: list[int]


def score_file(path: Path, config: ScoreFileConfig) -> dict[str, Any]:
    """Return the figures of a file; raises JudgeError for one that breaks its format, ConfigError for a key that is missing."""
    return {"rules": config.rules, **RULES[config.rules](path, config)}


def _geneval(path: Path, config: ScoreFileConfig) -> dict[str, Any]:
    outcomes, reasons = [], []
    for row in _rows(path, _GenEvalRow):
        task = str(row.metadata.get("tag"))
        found = {
            name: geneval.keep_detections(_detections(boxes, row.colors.get(name, ())), task, config.max_overlap)
            for name, boxes in row.detections.items()
        }
        verdict = geneval.judge(row.metadata, found)
        outcomes.append((task, verdict.correct))
        reasons.append(list(verdict.reasons))
    return {"images": len(outcomes), "accuracy": geneval.overall(outcomes), "broken": reasons}


def _detections(boxes: Sequence[_Box], colours: Sequence[str | None]) -> list[geneval.Detection]:
    padded = [*colours, *[None] * len(boxes)]
    return [geneval.Detection(box[:4], box[4], colour) for box, colour in zip(boxes, padded[: len(boxes)], strict=True)]


def _spatial(path: Path, _: ScoreFileConfig) -> dict[str, Any]:
    return _mean(
        t2i_compbench.spatial_2d(row.locality, _found(row.first), _found(row.second))
        for row in _rows(path, _SpatialRow)
    )


def _found(box: _Box | None) -> t2i_compbench.Found | None:
    return None if box is None else t2i_compbench.Found(box[:4], box[4])


def _numeracy(path: Path, _: ScoreFileConfig) -> dict[str, Any]:
    return _mean(t2i_compbench.numeracy(row.expected, row.counted) for row in _rows(path, _NumeracyRow))


def _attributes(path: Path, _: ScoreFileConfig) -> dict[str, Any]:
    return _mean(t2i_compbench.attribute_binding(row.p_yes) for row in _rows(path, _AttributesRow))


def _mean(scores: Any) -> dict[str, Any]:
    scores = list(scores)
    return {"images": len(scores), "unreadable": scores.count(None), "mean": mean_score(scores)}


def _tifa(path: Path, config: ScoreFileConfig) -> dict[str, Any]:
    if config.embedder is None:
        raise ConfigError(
            "score_file: rules=tifa needs embedder, which finds the choice nearest to an answer; set it, such as "
            "embedder=sentence-transformers/all-mpnet-base-v2"
        )
    from selma_ray.judging.embedding import SentenceEmbedder

    rows = _rows(path, _TifaRow)
    questions = [
        Question(number, row.element_type, row.question, (), row.choices, row.answer)
        for number, row in enumerate(rows, start=1)
    ]
    scores = tifa(questions, [row.given for row in rows], SentenceEmbedder(config.embedder))
    by_caption: dict[str, list[tuple[str, float | None]]] = {}
    for row, score in zip(rows, scores, strict=True):
        by_caption.setdefault(row.id, []).append((row.element_type, score))
    return asdict(summarise_tifa(by_caption))


def _pickscore(path: Path, config: ScoreFileConfig) -> dict[str, Any]:
    rows = _rows(path, _PickScoreRow)
    accuracy = agreement.pickscore_accuracy(
        [row.label for row in rows], [row.probabilities for row in rows], config.tie_threshold
    )
    return {"pairs": len(rows), "accuracy": accuracy}


def _imagereward(path: Path, _: ScoreFileConfig) -> dict[str, Any]:
    rows = _rows(path, _ImageRewardRow)
    accuracy = agreement.imagereward_accuracy([row.ranks for row in rows], [row.rewards for row in rows])
    return {"prompts": len(rows), "accuracy": accuracy}


def _hpsv2(path: Path, _: ScoreFileConfig) -> dict[str, Any]:
    rows = _rows(path, _RankingsRow)
    return {
        "prompts": len(rows),
        "agreement": mean_score(agreement.inversion_score(row.predicted, row.gold) for row in rows),
    }


def _dsg(path: Path, config: ScoreFileConfig) -> dict[str, Any]:
    if config.annotations is None:
        raise ConfigError("score_file: rules=dsg needs annotations; set it to the release's dsg-1k-anns.csv")
    # SELMA's release does not strip the white space of a dependency cell.
    parents = read_parents(config.annotations, strip=config.scorer != "selma")
    scorer = SCORERS[config.scorer]
    models = {}
    for model, answers in read_answers(path, parents).items():
        # The release counts every item of the sources that a model was asked about.
        sources = {_source(item) for item in answers}
        items = complete(answers, [item for item in parents if _source(item) in sources])
        mean = overall_score(config.scorer, [scorer(questions) for questions in items.values()])
        models[model] = {"items": len(items), "mean": mean}
    return {"scorer": config.scorer, "models": models}


def _source(item: str) -> str:
    return item.rpartition("_")[0]


def _rows(path: Path, row: type[_Row]) -> list[_Row]:
    try:
        lines = numbered_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"{path} cannot be read ({error}); name a JSON Lines file") from None
    rows = []
    for number, line in lines:
        try:
            rows.append(row.model_validate(parse_json(line)))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            key = ".".join(map(str, fault["loc"])) or "the whole"
            raise JudgeError(f"{path} line {number}: {key}: {fault['msg']}; fix the file") from None
        except ValueError as error:
            raise JudgeError(f"{path} line {number}: the whole: Invalid JSON: {error}; fix the file") from None
    if not rows:
        raise JudgeError(f"{path} must have at least one line, got none; name another file")
    return rows


RULES: Mapping[Rules, Callable[[Path, ScoreFileConfig], dict[str, Any]]] = {
    "dsg": _dsg,
    "geneval": _geneval,
    "hpsv2": _hpsv2,
    "imagereward": _imagereward,
    "pickscore": _pickscore,
    "t2i_attributes": _attributes,
    "t2i_numeracy": _numeracy,
    "t2i_spatial": _spatial,
    "tifa": _tifa,
}

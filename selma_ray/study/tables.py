"""A study's tables: every model at every guidance scale, against base at the same scale and each at its best, over all seeds.

A prompt's images of all seeds are averaged first; intervals are over prompts, deviations over seeds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selma_ray.evaluation.config import ANSWERS, EvaluationConfig
from selma_ray.evaluation.summary import BASE, MERGED, ModelScores, model_scores, summarise
from selma_ray.experts.plan import MIXED_PREFIX, MIXTURE
from selma_ray.judging.questions import PromptWithQuestions
from selma_ray.storage import RunFolder
from selma_ray.study.config import ArmConfig, Kind, StudyConfig
from selma_ray.study.costs import cost_rows
from selma_ray.study.own_skills import joined, on_own_skills
from selma_ray.study.study import Study

__all__ = ["StudyScores", "model_kind", "model_titles", "write_tables"]


@dataclass(frozen=True)
class StudyScores:
    """The scores of every model at every guidance scale that all finished seeds have, pooled over those seeds."""

    suite: Sequence[PromptWithQuestions]
    config: EvaluationConfig
    seeds: tuple[int, ...]
    pooled: Mapping[float, Mapping[str, ModelScores]]
    arms: Mapping[str, ArmConfig]
    judge: str = ""

    @classmethod
    def read(
        cls, study: Study, suite: Sequence[PromptWithQuestions], config: EvaluationConfig, kind: str = ANSWERS
    ) -> "StudyScores":
        """Read what has been scored so far of the experiments that the recipe names now; `kind` says by which of the judges."""
        names = study.config
        pooled: dict[float, dict[str, ModelScores]] = {}
        seeds: set[int] = set()
        judge = ""
        for guidance_scale in names.guidance_scales:
            for seed in names.seeds:
                folder = study.scores(seed, guidance_scale)
                done = folder.done("scores")
                if done is None:
                    continue
                seeds.add(seed)
                of_scale = pooled.setdefault(guidance_scale, {})
                for model in (name for name in done["models"] if _is_wanted(name, names)):
                    files = folder.files("evaluation", model, kind, suffix=".parquet")
                    if not files:  # scored before there was a second judge
                        continue
                    answers = folder.read_table(files).to_pylist()
                    judge = answers[0]["judge"]
                    scores = model_scores(answers, config.dsg_scorer)
                    of_scale[model] = joined(of_scale[model], scores) if model in of_scale else scores
        return cls(suite, config, tuple(sorted(seeds)), pooled, names.arms, judge)

    def summary(self, scores: Mapping[str, ModelScores], reference: str | ModelScores = BASE) -> dict[str, Any]:
        """Return the figures of models and their differences to a reference, which takes the place of base."""
        base = scores[reference] if isinstance(reference, str) else reference
        others = {name: each for name, each in scores.items() if name != BASE}
        return summarise({BASE: base, **others}, self.suite, self.config, 0, {}).as_dict()

    def best(self) -> dict[str, float]:
        """Return the guidance scale that each model scores highest at."""
        means = {scale: self.summary(models)["models"] for scale, models in self.pooled.items()}
        names = {name for models in means.values() for name in models}
        return {
            name: max((s for s in means if name in means[s]), key=lambda s: means[s][name]["dsg"] or 0.0)
            for name in names
        }


def write_tables(study: Study, scores: StudyScores, second: StudyScores | None = None) -> str:
    """Write study.json and tables.md, and return the place of the latter; the second judge's tables stand below the first's."""
    reference = f"{study.config.reference}.merged"
    by_scale = {scale: scores.summary(models) for scale, models in scores.pooled.items()}
    best_scale = scores.best()
    at_best = {name: scores.pooled[scale][name] for name, scale in best_scale.items()}
    against = {
        scale: scores.summary(models, reference) for scale, models in scores.pooled.items() if reference in models
    }
    best = scores.summary(at_best)
    titles = model_titles(study.config, _names(by_scale))
    values = {
        "seeds": list(scores.seeds),
        "prompts": len(scores.suite),
        "guidance_scales": {f"{scale:g}": summary for scale, summary in by_scale.items()},
        "best": {"scales": best_scale, **best},
        "against_reference": {f"{scale:g}": summary["differences"] for scale, summary in against.items()},
        "titles": titles,
    }
    folder = study.results
    folder.write_json(values, "study.json")
    text = "\n".join(
        [
            *([f"Judge: {scores.judge}.", ""] if second else []),
            f"Base and every model on the same {len(scores.suite)} prompts, {_seed_words(scores.seeds)}. DSG in percent; "
            "95% intervals over prompts in brackets, ± is the deviation between seeds.",
            "",
            *_score_rows(by_scale, titles, len(scores.seeds), len(scores.config.seeds)),
            "",
            "Difference to base at the same guidance, and of each at its own best guidance to base at its best:",
            "",
            *_difference_rows(by_scale, best, best_scale, titles),
            "",
            f"Gain of “{titles[reference]}” over base by kind of question:",
            "",
            *_category_rows(by_scale, reference),
            "",
            f"Every model minus “{titles[reference]}” at the same guidance:",
            "",
            *_against_rows(against, reference, titles),
            "",
            *_own_skill_tables(scores, titles),
            *(_second_judge_tables(second, titles) if second else []),
            *_cost_table(study),
        ]
    )
    folder.write_bytes(text.encode(), "tables.md")
    return folder.path("tables.md")


def _second_judge_tables(second: StudyScores, titles: Mapping[str, str]) -> list[str]:
    """Return what a judge that was never a reward says of the same images."""
    by_scale = {scale: second.summary(models) for scale, models in second.pooled.items()}
    best_scale = second.best()
    best = second.summary({name: second.pooled[scale][name] for name, scale in best_scale.items()})
    return [
        f"## By the second judge, {second.judge}, which was no reward",
        "",
        *_score_rows(by_scale, titles, len(second.seeds), len(second.config.seeds)),
        "",
        "Difference to base at the same guidance, and of each at its own best guidance to base at its best:",
        "",
        *_difference_rows(by_scale, best, best_scale, titles),
        "",
        *_own_skill_tables(second, titles),
    ]


def _own_skill_tables(scores: StudyScores, titles: Mapping[str, str]) -> list[str]:
    """Return how far models of all skills are ahead of experts that each draw their own skill's captions alone."""
    lines = []
    for arm, config in scores.arms.items():
        own = {scale: on_own_skills(models, arm, scores.suite) for scale, models in scores.pooled.items()}
        against = {
            scale: scores.summary(_of_all_skills(scores.pooled[scale]), each)
            for scale, each in own.items()
            if each is not None
        }
        if against:
            about = f"Models of all skills minus “{config.title}”, each expert on the captions of its own skill:"
            lines += [about, "", *_against_rows(against, BASE, titles), ""]
    return lines


def _of_all_skills(models: Mapping[str, ModelScores]) -> dict[str, ModelScores]:
    return {
        name: each for name, each in models.items() if name != BASE and model_kind(name.partition(".")[2]) != "experts"
    }


def _cost_table(study: Study) -> list[str]:
    """Return what each experiment took; what one shares with an earlier one is counted there."""
    config = study.config
    folders = {
        arm.title: [RunFolder(study.place(name, f"seed={seed}")) for seed in config.seeds]
        for name, arm in config.arms.items()
    }
    rows = [[row["title"], f"{row['minutes']:.1f}", f"{row['images']:,}"] for row in cost_rows(folders)]
    head = ["experiment", "minutes beyond what it shares", "images drawn while training, shared ones too"]
    return ["Cost of each experiment, a mean over its seeds:", "", *_table(head, rows), ""] if rows else []


def _seed_words(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _is_wanted(model: str, study: StudyConfig) -> bool:
    return model == BASE or model.partition(".")[0] in study.arms


def model_kind(model: str) -> Kind:
    """Return which of an experiment's models a name says."""
    if model == "merged" or model.startswith("round-"):
        return "merged"
    if model == MIXTURE:
        return "moe"
    return "mixed" if model.startswith(MIXED_PREFIX) else "experts"


def model_titles(study: StudyConfig, names: Iterable[str]) -> dict[str, str]:
    """Return what the tables call each model: an experiment's merged or mixture model by the experiment's title alone."""
    titles = {}
    for name in names:
        arm, _, model = name.partition(".")
        if model:
            title = study.arms[arm].title
            titles[name] = title if model in (MERGED, MIXTURE) else f"{title}: {model}"
    return {BASE: BASE, **titles}


def _score_rows(
    by_scale: Mapping[float, Mapping[str, Any]], titles: Mapping[str, str], num_seeds: int, images_per_seed: int
) -> list[str]:
    def cell(scores: Mapping[str, Any] | None) -> str:
        scored = len(scores["seeds"]["means"]) // images_per_seed if scores else num_seeds
        return _figure(scores) + (f" ({scored} of {num_seeds} seeds)" if scored < num_seeds else "")

    head = ["model", *(f"guidance {scale:g}" for scale in by_scale)]
    rows = [
        [titles[name], *(cell(summary["models"].get(name)) for summary in by_scale.values())]
        for name in _names(by_scale)
    ]
    return _table(head, rows)


def _difference_rows(
    by_scale: Mapping[float, Mapping[str, Any]],
    best: Mapping[str, Any],
    best_scale: Mapping[str, float],
    titles: Mapping[str, str],
) -> list[str]:
    head = ["model", *(f"guidance {scale:g}" for scale in by_scale), "each at its best"]
    rows = [
        [
            titles[name],
            *(_difference(summary["differences"].get(name)) for summary in by_scale.values()),
            f"{_difference(best['differences'].get(name))} (at {best_scale[name]:g}, base at {best_scale[BASE]:g})",
        ]
        for name in _names(by_scale)
        if name != BASE
    ]
    return _table(head, rows)


def _category_rows(by_scale: Mapping[float, Mapping[str, Any]], reference: str) -> list[str]:
    found = {
        scale: summary["differences"][reference]["categories"]
        for scale, summary in by_scale.items()
        if reference in summary["differences"]
    }
    categories = sorted({name for table in found.values() for name in table})
    head = ["questions", *(f"guidance {scale:g}" for scale in found)]
    return _table(head, [[name, *(_difference(table.get(name)) for table in found.values())] for name in categories])


def _against_rows(against: Mapping[float, Mapping[str, Any]], reference: str, titles: Mapping[str, str]) -> list[str]:
    names = [name for name in _names(against) if name not in (BASE, reference)]
    head = ["model", *(f"guidance {scale:g}" for scale in against)]
    rows = [
        [titles[name], *(_difference(summary["differences"].get(name)) for summary in against.values())]
        for name in names
    ]
    return _table(head, rows)


def _names(by_scale: Mapping[float, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for summary in by_scale.values() for name in summary["models"]))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _figure(scores: Mapping[str, Any] | None) -> str:
    if scores is None or scores["dsg"] is None:
        return "–"
    low, high = (100 * bound for bound in scores["interval"])
    deviation = _deviation(scores["seeds"]["deviation"])
    return f"{100 * scores['dsg']:.1f} [{low:.1f}, {high:.1f}]{deviation}"


def _deviation(value: float | None) -> str:
    return "" if value is None else f" ± {100 * value:.1f}"


def _difference(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "–"
    low, high = (100 * bound for bound in difference["interval"])
    return f"{100 * difference['mean']:+.1f} [{low:+.1f}, {high:+.1f}]"

"""Search of merge weights on the dev splits: Ray renders and judges candidates side by side, for the stage that merges experts."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from selma_ray.adapters.files import adapter_digest
from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.placement import role_options
from selma_ray.config import identity
from selma_ray.judging.dev_scores import DevScorer
from selma_ray.judging.judges.opening import judge_identity
from selma_ray.merging.config import MergingConfig
from selma_ray.merging.search import MergeCandidate, SearchResult, num_candidates, search_weights
from selma_ray.models.device import see_own_gpus, task_options
from selma_ray.models.identity import model_identity
from selma_ray.progress import Progress, Report
from selma_ray.records import content_id
from selma_ray.storage import RunFolder

__all__ = ["search_merge"]


def search_merge(
    folder: RunFolder,
    merging: MergingConfig,
    scorer: DevScorer,
    resources: Mapping[str, float],
    seed: int,
    cluster: ClusterConfig,
    report: Report | None = None,
) -> SearchResult:
    """Return the weights of a run's experts that score best on the dev prompts of `scorer`, whose skills are merged.

    Candidates and their scores are kept in `search/<name>/`; a search that was stopped goes on. `resources` are those of a task that
    scores one candidate. Raises AdapterError where an expert does not fit.
    """
    from selma_ray.merging.inputs import open_run_experts
    from selma_ray.merging.weights import ALL, block_group

    config, model, skills = merging.search, scorer.model, list(scorer.prompts)
    experts = open_run_experts(folder, skills, model)
    modules = next(iter(experts.values())).modules
    groups = sorted({block_group(module) for module in modules}) if config.by_block else [ALL]
    total = num_candidates(len(skills), config)
    done = 0

    def score(candidates: Sequence[MergeCandidate]) -> Iterator[tuple[int, float]]:
        nonlocal done
        done = max(done, candidates[0].number)
        for number, value in _scores(candidates, scorer, resources, folder, merging.scale, cluster):
            done += 1
            if report:
                report(Progress("merge", done, total, f"candidate {number}: {100 * value:.1f}% DSG on dev prompts"))
            yield number, value

    key = content_id(
        experts=[adapter_digest(expert.folder) for expert in experts.values()],
        base=model_identity(model),
        judge=judge_identity(scorer.judge),
        evaluation={"sampling": identity(scorer.sampling), "dsg_scorer": scorer.dsg_scorer},
        prompts={skill: [prompt.id for prompt in of_skill] for skill, of_skill in scorer.prompts.items()},
        scale=merging.scale,
        search=identity(config),
        seed=seed,
    )
    return search_weights(skills, groups, config, seed, score, folder, f"search/{merging.name}", key)


def _scores(
    candidates: Sequence[MergeCandidate],
    scorer: DevScorer,
    resources: Mapping[str, float],
    folder: RunFolder,
    scale: float,
    cluster: ClusterConfig,
) -> Iterator[tuple[int, float]]:
    """Yield each candidate's score as it is known; as many are rendered at once as the cluster holds."""
    import ray

    num_gpus = resources["num_gpus"]
    options = {**resources, **task_options(num_gpus), **role_options("render", cluster)}
    task = ray.remote(**options)(_score_candidate)
    shared = ray.put(scorer)
    pending = {task.remote(candidate, shared, folder, scale, num_gpus): candidate for candidate in candidates}
    try:
        while pending:
            (ready,), _ = ray.wait(list(pending))
            candidate = pending.pop(ready)
            yield candidate.number, ray.get(ready)
    finally:
        for unfinished in pending:
            ray.cancel(unfinished)


def _score_candidate(
    candidate: MergeCandidate, scorer: DevScorer, folder: RunFolder, scale: float, num_gpus: float
) -> float:
    """Write the candidate's adapter on this machine's disk, score it, delete it: no run keeps an adapter per candidate."""
    see_own_gpus(num_gpus)
    from selma_ray.merging.inputs import open_run_experts
    from selma_ray.merging.run import write_candidate

    skills = list(scorer.prompts)
    with tempfile.TemporaryDirectory() as temporary:
        write_candidate(Path(temporary), open_run_experts(folder, skills, scorer.model), candidate.weights, scale)
        return scorer(temporary, skills)["dsg"]

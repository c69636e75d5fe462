"""Stage 1: the LLM writes each skill's prompts (SELMA, section 3.1); each flows on as soon as it is kept."""

from collections.abc import Callable, Collection, Sequence

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from selma_ray.cluster.asked_source import AskedSource
from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.placement import beside_driver
from selma_ray.prompts.config import PromptsConfig
from selma_ray.prompts.feed import REQUEST_SCHEMA, DecideAnswers, PromptFeed
from selma_ray.prompts.llm import LLMStage, answer_stage
from selma_ray.prompts.store import prompt_summary, read_prompts
from selma_ray.skills import Skill
from selma_ray.storage import RunFolder

__all__ = ["prompt_stream", "prompt_summary", "read_prompts"]

_PROMPTS_PER_BLOCK = 16


def prompt_stream(
    skills: Sequence[Skill],
    config: PromptsConfig,
    seed: int,
    folder: RunFolder,
    cluster: ClusterConfig,
    *,
    excluded: Collection[str] = (),
    unfinished: Callable[[pa.Table], pa.Table] | None = None,
    llm_stage: LLMStage | None = None,
) -> Dataset:
    """Return the stream of all kept prompts (rows of PROMPT_SCHEMA): first those of an earlier start, then new ones.

    Prompts in `excluded` (those of the test set) are never kept. `unfinished` chooses which of an earlier start are wanted: a hundred
    thousand that pass for nothing take minutes. `llm_stage` takes the place of the recipe's engine. While the stream runs, a skill that
    cannot reach its number of prompts raises PromptYieldError.
    """
    block_size = config.block_size
    feed = ray.remote(PromptFeed).options(**beside_driver()).remote(skills, config, seed, folder, excluded, block_size)
    missing = ray.get(feed.open.remote())
    streams = []
    before = pa.concat_tables(read_prompts(folder, skill.name) for skill in skills)
    if unfinished:
        before = unfinished(before)
    if before.num_rows or not missing:
        streams.append(ray.data.from_arrow(_blocks(before)))
    if missing:
        answer = llm_stage or answer_stage(skills, config, cluster, block_size)
        streams.append(_new_prompts(feed, answer, missing, _max_blocks(skills, config, block_size)))
    return streams[0].union(*streams[1:]) if len(streams) > 1 else streams[0]


def _new_prompts(feed: ray.actor.ActorHandle, answer: LLMStage, missing: int, max_blocks: int) -> Dataset:
    """Apply the stages of the stream; the limit ends the LLM's work on requests that came to be superfluous."""
    requests = ray.data.read_datasource(
        AskedSource(feed.ask, REQUEST_SCHEMA, max_blocks),
        override_num_blocks=max_blocks,
        num_cpus=0,
        compute=TaskPoolStrategy(size=1),
    )
    kept = answer(requests).map_batches(
        DecideAnswers,
        fn_constructor_args=(feed,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=1),
        **beside_driver(),
    )
    return kept.limit(missing)


def _blocks(prompts: pa.Table) -> list[pa.Table]:
    """Cut prompts into small blocks: a stage works on a block as a whole."""
    starts = range(0, max(1, prompts.num_rows), _PROMPTS_PER_BLOCK)
    return [prompts.slice(start, _PROMPTS_PER_BLOCK) for start in starts]


def _max_blocks(skills: Sequence[Skill], config: PromptsConfig, block_size: int) -> int:
    return -(-len(skills) * config.max_requests // block_size) + 1

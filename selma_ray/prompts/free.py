"""A stand-in for the language model, chosen by `prompts.llm.engine: free`: it answers at once, or after a stated time.

Its answers depend on the seed of the request alone and are diverse enough to be kept, so a pipeline can be measured or
rehearsed without a model. They teach nothing: runs that train need `vllm` or `remote`.
"""

import random
import time
from collections.abc import Callable, Sequence

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset

from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.placement import role_options
from selma_ray.prompts.config import PromptsConfig
from selma_ray.skills import Skill

__all__ = ["AnswerAtNoCost", "free_stage", "invent_caption"]


def _words(text: str) -> list[str]:
    return text.split()


_COUNTS = _words("one two three four five six seven eight nine ten eleven twelve")
_ADJECTIVES = _words(
    "amber ancient black blue brass broken checked chipped crimson curved dented dotted dusty empty faded folded furry "
    "giant glazed glowing golden green grey hollow ivory knitted leather narrow orange painted paper pink polished "
    "purple rusty shiny silver striped tiny torn velvet violet wet white wicker wooden woollen woven yellow"
)
_NOUNS = _words(
    "anchors apples bagpipes baskets bells benches bicycles boats books boots bottles bowls bridges brooms buckets "
    "buttons cacti cakes cameras candles carrots chairs clocks clouds coats cups desks doors dragons drums ducks eggs "
    "engines feathers fences fish flutes foxes frogs gates geese goats guitars hammers hats horses houses kettles keys "
    "kites ladders lamps lanterns leaves lemons mirrors moths mugs nests oars onions owls pears pencils pigeons pillows "
    "plates pumpkins rabbits robots ropes sails scarves shells ships shoes snails spoons stools stoves suitcases swans "
    "tables teapots tents towers trains trees trumpets turtles umbrellas vases violins wagons walls wheels windmills"
)
_RELATIONS = _words(
    "above against around before behind below beneath beside between beyond facing inside near opposite outside over "
    "supporting touching under within"
)
_PLACES = _words(
    "alley attic barn basement bay beach cabin canyon castle cave cellar church courtyard desert dock farm field forest "
    "garage garden harbour hallway island kitchen lake library market meadow museum orchard park pier plaza station "
    "street studio swamp valley village workshop"
)
_TIMES = _words("dawn daybreak dusk Easter midday midnight night noon sunrise sunset twilight Christmas")


def free_stage(
    skills: Sequence[Skill], config: PromptsConfig, cluster: ClusterConfig, batch_size: int
) -> Callable[[Dataset], Dataset]:
    """Return a stage that answers requests with the stand-in, in as many actors as the recipe has engines."""
    llm = config.llm

    def stage(requests: Dataset) -> Dataset:
        return requests.map_batches(
            AnswerAtNoCost,
            fn_constructor_args=(skills, config),
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=llm.min_replicas,
                max_size=llm.max_replicas,
                max_tasks_in_flight_per_actor=config.blocks_per_engine(len(skills)),
            ),
            num_cpus=llm.num_cpus,
            num_gpus=llm.num_gpus or None,
            **role_options("llm", cluster),
        )

    return stage


class AnswerAtNoCost:
    """Answers requests one after another, each after `prompts.llm.free.latency_s`, as a busy engine would."""

    def __init__(self, skills: Sequence[Skill], config: PromptsConfig) -> None:
        self._max_words = {skill.name: skill.max_words for skill in skills}
        self._num_captions = config.per_request
        self._latency_s = config.llm.free.latency_s

    def __call__(self, requests: pa.Table) -> pa.Table:
        """Take rows (skill, request, seed, first_number); returns rows (skill, request, answer, truncated)."""
        if self._latency_s:
            time.sleep(self._latency_s * requests.num_rows)
        rows = requests.select(["skill", "request", "seed", "first_number"]).to_pylist()
        return pa.Table.from_pylist(
            [
                {
                    "skill": row["skill"],
                    "request": row["request"],
                    "answer": self._answer(row["skill"], row["seed"], row["first_number"]),
                    "truncated": False,
                }
                for row in rows
            ]
        )

    def _answer(self, skill: str, seed: int, first_number: int) -> str:
        rng = random.Random(seed)
        first, *others = (invent_caption(rng, self._max_words[skill]) for _ in range(self._num_captions))
        return "\n".join([f" {first}", *(f"{number}. {text}" for number, text in enumerate(others, first_number + 1))])


def invent_caption(rng: random.Random, max_words: int = 30) -> str:
    """Return a caption of 15 words, cut to `max_words`: two of them are hardly ever alike by the ROUGE-L rule."""
    pick = rng.choice
    words = (
        f"{pick(_COUNTS)} {pick(_ADJECTIVES)} {pick(_NOUNS)} {pick(_RELATIONS)} {pick(_COUNTS)} {pick(_ADJECTIVES)} "
        f"{pick(_NOUNS)} and {pick(_ADJECTIVES)} {pick(_NOUNS)} in the {pick(_PLACES)} at {pick(_TIMES)}"
    ).split()
    return " ".join(words[:max_words])

"""Whether the stream of prompts slows down as it grows: time per prompt from the first thousand to the twentieth.

Run: python -m benchmarks.growth

One skill, 20,000 prompts, the stand-in language model that answers at no cost: what is timed is Ray Data, the parsing, the
diversity filter and the records. Starting Ray and the first thousand prompts, which wait for actors to start, do not count.
"""

import itertools
import statistics
import tempfile
import time

from benchmarks.common import machine, print_result, print_table
from selma_ray.cluster.config import ClusterConfig
from selma_ray.cluster.connection import connect
from selma_ray.prompts.config import LLMConfig, PromptsConfig
from selma_ray.prompts.stream import prompt_stream
from selma_ray.skills import load_skill
from selma_ray.storage import RunFolder

NUM_PROMPTS = 20_000
_THOUSANDS_COMPARED = 5


def main() -> None:
    """Stream the prompts, then print a table and one JSON line."""
    print(machine())
    cluster = ClusterConfig(num_cpus=2, object_store_memory_gb=0.5)
    connect(cluster)
    config = PromptsConfig(per_skill=NUM_PROMPTS, max_requests=NUM_PROMPTS // 10, llm=LLMConfig(engine="free"))
    with tempfile.TemporaryDirectory() as folder:
        stream = prompt_stream([load_skill("diffusiondb")], config, 0, RunFolder(folder), cluster)
        finished_s = [time.monotonic() for number, _ in enumerate(stream.iter_rows(), start=1) if number % 1000 == 0]
    thousand_s = [after - before for before, after in itertools.pairwise(finished_s)]
    first = statistics.median(thousand_s[:_THOUSANDS_COMPARED])
    last = statistics.median(thousand_s[-_THOUSANDS_COMPARED:])
    rows = [[f"{number:,}", f"{seconds:.2f}"] for number, seconds in enumerate(thousand_s, start=2)]
    print_table(["thousand prompts", "ms a prompt"], rows)
    print_result({"last_over_first": round(last / first, 3), "ms_per_prompt": round(last, 2)})


if __name__ == "__main__":
    main()

"""What the writer of questions hands to vLLM; the engine itself is in tests/integration."""

import json

import xgrammar

from selma_ray.judging.writing.config import QuestionLLMConfig
from selma_ray.judging.writing.engine import _engine_options, _sampling_options
from selma_ray.judging.writing.requests import DSG_CALLS, dsg_schema, tifa_schema
from selma_ray.judging.writing.rounds import Request


def test_the_first_call_is_greedy_and_held_to_its_schema() -> None:
    schema = json.dumps(dsg_schema("tuple", []))
    asked = _sampling_options(Request("0:tuple:0", "text", 0.0, 5, "\ninput:", schema), 100, structured=dict)
    assert asked == {"temperature": 0.0, "max_tokens": 100, "structured_outputs": {"json": schema}}


def test_a_repeated_call_is_sampled_by_its_seed_and_text_stops_before_another_example() -> None:
    asked = _sampling_options(Request("0:tuple:1", "text", 0.7, 5, "\ninput:"), 100, structured=dict)
    assert asked == {"temperature": 0.7, "max_tokens": 100, "seed": 5, "stop": ["\ninput:"]}


def test_prefixes_are_cached_and_seeds_survive_on_the_cpu() -> None:
    options = _engine_options(QuestionLLMConfig())
    assert options["enable_prefix_caching"]
    assert options["enable_chunked_prefill"] is False
    assert options["max_num_batched_tokens"] >= options["max_model_len"]
    assert "enable_chunked_prefill" not in _engine_options(QuestionLLMConfig(num_gpus=1))


def test_vllms_grammar_compiler_takes_every_schema() -> None:
    assert _engine_options(QuestionLLMConfig())["structured_outputs_config"]["backend"] == "xgrammar"
    for schema in (*(dsg_schema(call, [1, 2, 3]) for call in DSG_CALLS), tifa_schema()):
        assert xgrammar.Grammar.from_json_schema(json.dumps(schema), any_whitespace=False)

"""What the LLM is asked: an instruction, the skill's rules, and a numbered list of examples for it to continue."""

from collections.abc import Sequence
from dataclasses import dataclass

from selma_ray.skills import Skill

__all__ = ["PromptRequest", "compose_grammar", "request_text"]


@dataclass(frozen=True)
class PromptRequest:
    """One request to the LLM; `number` counts a skill's requests from 0, `seed` is its sampling seed."""

    skill: str
    number: int
    seed: int
    examples: tuple[str, ...]


def request_text(skill: Skill, examples: Sequence[str], num_prompts: int) -> str:
    """Return the text that the LLM completes with `num_prompts` items, the first without its number."""
    rules = [*skill.rules, f"Each description has at most {skill.max_words} words.", "No two descriptions are alike."]
    lines = [
        f"Write {num_prompts} new descriptions of images, one per line, as a numbered list.",
        f"They train a model in this skill: {skill.description}",
        "Rules:",
        *(f"- {rule}" for rule in rules),
        "",
        "Descriptions:",
        *(f"{number}. {example}" for number, example in enumerate(examples, start=1)),
    ]
    return "\n".join(lines) + f"\n{len(examples) + 1}."


def compose_grammar(caption_grammar: str, first_number: int, num_prompts: int) -> str:
    """Return an EBNF whose root is the answer to a request: `num_prompts` captions, numbered from the second on."""
    numbers = range(first_number + 1, first_number + num_prompts)
    items = "".join(f' "\\n{number}. " caption' for number in numbers)
    return f'root ::= " " caption{items} "\\n"\n{caption_grammar}'

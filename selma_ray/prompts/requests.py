"""What the LLM is asked: an instruction, the skill's rules, and a numbered list of examples for it to continue."""

from collections.abc import Sequence
from dataclasses import dataclass

from selma_ray.skills import Skill

__all__ = ["PromptRequest", "chat_message", "compose_grammar", "request_text"]


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


def chat_message(text: str, first_number: int, num_prompts: int) -> str:
    """Return a request's text as a message to a chat model, which answers on lines of its own and needs to be told so."""
    last_number = first_number + num_prompts - 1
    return (
        f"{text.removesuffix(f'{first_number}.').rstrip()}\n\nGo on with this list from {first_number} to {last_number}, "
        "one description per line. Answer with the list alone."
    )


def compose_grammar(caption_grammar: str, first_number: int, num_prompts: int, chat: bool = False) -> str:
    """Return an EBNF whose root is the answer to a request: `num_prompts` numbered captions.

    The first one's number stands in the request already, unless it is a chat's message.
    """
    numbers = range(first_number + 1, first_number + num_prompts)
    first = f'"{first_number}. "' if chat else '" "'
    items = "".join(f' "\\n{number}. " caption' for number in numbers)
    return f'root ::= {first} caption{items} "\\n"\n{caption_grammar}'

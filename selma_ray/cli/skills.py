"""`selma skills`: the packaged skills, and what a skill file of one's own would ask for, before a language model is started."""

import json
from itertools import islice

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from selma_ray.cli.show import console
from selma_ray.errors import SkillError, first_line
from selma_ray.prompts.config import PromptsConfig
from selma_ray.prompts.diversity import DiversityFilter
from selma_ray.prompts.requests import compose_grammar, request_text
from selma_ray.skills import Skill, load_skill, packaged_skills
from selma_ray.words import count_words

__all__ = ["check_skill", "list_skills"]


def list_skills(*, as_json: bool) -> None:
    """Print the packaged skills and what each teaches."""
    skills = {name: load_skill(name).description for name in packaged_skills()}
    if as_json:
        console.print(json.dumps(skills), markup=False, soft_wrap=True)
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for heading in ("name", "teaches"):
        table.add_column(heading)
    for name, description in skills.items():
        table.add_row(escape(name), escape(description))
    console.print(table)


def check_skill(name: str) -> None:
    """Print what a skill's file holds and the request that it makes; raises SkillError, with one line, for a fault."""
    skill = load_skill(name)
    _check_grammar(skill)
    prompts = PromptsConfig()
    longest = max(map(count_words, skill.seeds))
    console.print(f"[bold]{escape(skill.name)}[/bold]: {escape(skill.description)}")
    console.print(f"{len(skill.seeds)} seeds, the longest of {longest} words, of at most max_words={skill.max_words}")
    if len(skill.seeds) < prompts.examples_per_request:
        console.print(
            f"A request shows {prompts.examples_per_request} examples: with so few seeds the first ones show all of them."
        )
    for seed, other, score in _alike(skill, prompts.rouge_l_threshold):
        console.print(
            f"These seeds are more alike (ROUGE-L {score:.2f}) than kept prompts may be; change one:\n  {seed}\n  {other}",
            markup=False,
        )
    console.print(f"Grammar: {'none' if skill.grammar is None else 'compiles'}")
    sampling = skill.sampling.model_dump(exclude_none=True)
    console.print(f"Sampling of its own: {', '.join(f'{key}={value}' for key, value in sampling.items()) or 'none'}")
    console.print("\nThe first request, as a language model gets it:", style="bold")
    examples = list(islice(skill.seeds, prompts.examples_per_request))
    console.print(request_text(skill, examples, prompts.per_request), markup=False)


def _alike(skill: Skill, threshold: float) -> list[tuple[str, str, float]]:
    """Return pairs of seeds that the rule for kept prompts would not let stand side by side."""
    kept, found = DiversityFilter(threshold), []
    for seed in skill.seeds:
        if match := kept.match(seed):
            found.append((seed, match.prompt, match.score))
        kept.add(seed)
    return found


def _check_grammar(skill: Skill) -> None:
    """Compile a skill's grammar as vLLM will, where xgrammar is installed."""
    if skill.grammar is None:
        return
    try:
        from xgrammar import Grammar
    except ImportError:
        return
    try:
        Grammar.from_ebnf(compose_grammar(skill.grammar, first_number=1, num_prompts=2))
    except RuntimeError as error:
        raise SkillError(
            f"skill {skill.name}: grammar must be EBNF (xgrammar) with a rule caption, it does not compile: {first_line(error)}; fix it"
        ) from None

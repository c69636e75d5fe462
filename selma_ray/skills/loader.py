"""A skill: seed prompts, rules, a word cap and, where the LLM needs one, a grammar."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from selma_ray.config import StrictModel, read_yaml, validate
from selma_ray.errors import ConfigError, SkillError
from selma_ray.words import count_words, has_letter_or_digit

__all__ = ["Skill", "SkillSampling", "load_skill", "load_skills", "packaged_skills"]

_RESERVED_NAMES = ("base", "merged")


class SkillSampling(StrictModel):
    """How the LLM samples the prompts of one skill; what is not set is as in the recipe's `prompts.llm`, or not used."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    """Sampling temperature."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus of the sampled tokens."""
    top_k: int | None = Field(default=None, ge=1)
    """Number of likeliest tokens sampled from."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Least probability of a sampled token, as a share of the likeliest one's."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """Above 1, tokens of the request and the answer so far become less likely."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Above 0, tokens that the answer holds become less likely."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Above 0, tokens become less likely with each time that the answer holds them."""
    max_tokens: int | None = Field(default=None, ge=16)
    """Longest answer, in tokens."""


class Skill(StrictModel):
    """One skill to teach: what its prompts are like."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)
    """Name of the skill, and of its expert."""
    description: str
    """What the skill teaches, in one sentence."""
    max_words: int = Field(ge=1)
    """Longest prompt, in words; a character of Chinese or Japanese counts as one."""
    rules: tuple[str, ...] = ()
    """Rules the LLM is told."""
    grammar: str | None = None
    """EBNF (xgrammar) that defines a rule `caption`; answers are then decoded inside it."""
    sampling: SkillSampling = SkillSampling()
    """Sampling settings of this skill alone."""
    seeds: tuple[str, ...] = Field(min_length=1)
    """Prompts written by people, shown as examples; the first of all kept prompts."""

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in _RESERVED_NAMES:
            raise ValueError(f"must not be one of {', '.join(_RESERVED_NAMES)}, which name models of every evaluation")
        return name

    @field_validator("seeds")
    @classmethod
    def _seeds_fit(cls, seeds: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        cap = info.data.get("max_words")
        for number, seed in enumerate(seeds, start=1):
            if not has_letter_or_digit(seed):
                raise ValueError(f"seed {number} must not be empty; delete it")
            if cap and (count := count_words(seed)) > cap:
                raise ValueError(f"seed {number} must have at most max_words={cap} words, has {count}; shorten it")
        return seeds


def packaged_skills() -> list[str]:
    """Return the names of the skills that ship with the package, such as counting or miniature/counting."""
    root = Path(str(files("selma_ray.skills")))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def load_skill(name: str) -> Skill:
    """Load a packaged skill by name or a skill file by path; raises SkillError with one line."""
    packaged = Path(str(files("selma_ray.skills"))) / f"{name}.yaml"
    path = packaged if packaged.is_file() else Path(name)
    if not path.is_file():
        raise SkillError(
            f"skill {name!r} is neither packaged ({', '.join(packaged_skills())}) nor a file; fix the name"
        )
    try:
        return validate(Skill, read_yaml(path), source=str(path))
    except ConfigError as error:
        raise SkillError(str(error)) from None


def load_skills(names: Sequence[str]) -> list[Skill]:
    """Load several skills; raises SkillError where two bear the same name."""
    skills = [load_skill(name) for name in names]
    for position, skill in enumerate(skills):
        if skill.name in {other.name for other in skills[:position]}:
            raise SkillError(f"two skill files bear the name {skill.name!r}; rename one")
    return skills

"""`selma init`: a recipe and a skill file of one's own to begin with, every line of them explained."""

from pathlib import Path

from rich.markup import escape

from selma_ray.cli.show import console
from selma_ray.config import read_yaml
from selma_ray.errors import ConfigError
from selma_ray.models.locate import MINIATURE
from selma_ray.run.published import published_recipes
from selma_ray.run.recipe import load_recipe

__all__ = ["init"]

_RECIPE = """\
# A run of your own. Only what differs from the recipe it extends stands here; `selma explain KEY` tells what a key means and
# `selma recipes {extends} --resolved` prints every value.
extends: {extends}  # the demo's model knows a small world of its own; those for GPUs (workstation, sdxl, zimage, …) draw anything

# Prompts, images, experts and results go here: a path, s3://… or gs://…
run_dir: runs/{name}

# Each skill gets its own prompts and its own expert. `selma skills` lists those that come with selma_ray.
skills: [{skill}]

prompts:
  per_skill: 40         # prompts kept for each skill; published runs keep 1,000
images:
  per_prompt: 1         # images drawn of each prompt
experts:
  steps: 60             # training steps of each expert; published runs take 4,000
"""

_SKILL = """\
# What one skill's prompts are like. `selma skills check {skill}` shows what a language model is asked with it.
name: {name}            # of the skill and its expert: small letters, digits and _
description: pictures of animals that do what people do   # ends the sentence "They train a model in this skill: …"
max_words: 25           # a longer prompt is dropped

# Told to the language model, one by one.
rules:
  - Say what can be seen, in one plain sentence.
  - Name one animal, what it does and where.

# Prompts that you wrote. Three of them, or of those kept so far, are the examples of each request: the more they differ,
# the more the answers do.
seeds:
  - A fox in a green coat reads a newspaper at a bus stop.
  - Two otters play chess on a wooden pier.
  - A heron with an umbrella waits in front of a bakery.
  - A small bear paints a blue door.
  - Three mice row a boat across a pond at dawn.
  - An old tortoise plays the cello on an empty stage.

# Sampling of this skill alone; what is not here is as in the recipe's prompts.llm. The demo's temperature is for its own tight grammars.
sampling: {{temperature: 0.9, top_p: 0.95}}

"""


_GRAMMAR = """\
# Keeps a language model as small as the demo's to one sentence a line; a larger one draws a wider net without it.
grammar: |
  caption ::= first (" " word){4,20} "."
  first ::= "A" | "An" | "The" | "Some" | "Two" | "Three"
  word ::= [a-z]+ ","?
"""


def init(folder: str, name: str, extends: str) -> None:
    """Write NAME.yaml and NAME.skill.yaml into a folder; raises ConfigError where one is there, or no such recipe to extend."""
    if extends not in published_recipes() or "arms" in read_yaml(published_recipes()[extends]):  # a study
        raise ConfigError(f"--extends must be a published recipe, got {extends!r}; `selma recipes` lists them")
    if not name.isidentifier() or not name.islower() or not name.isascii() or name.startswith("_"):
        raise ConfigError(f"the name must be small letters, digits and _, a letter first, got {name!r}")
    place = Path(folder).expanduser()
    recipe, skill = place / f"{name}.yaml", place / f"{name}.skill.yaml"
    texts = {
        recipe: _RECIPE.format(name=name, extends=extends, skill=skill),
        skill: _SKILL.format(name=name, skill=skill) + (_GRAMMAR if _writes_little(extends) else ""),
    }
    for path in texts:
        if path.exists():
            raise ConfigError(f"{path} is there already; give another name, or delete it")
    place.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        console.print(f"Wrote [bold]{escape(str(path))}[/bold]")
    console.print(f"Next: selma skills check {skill}", markup=False)
    console.print(f"      selma plan {recipe}", markup=False)
    console.print(f"      selma run {recipe}", markup=False)


def _writes_little(extends: str) -> bool:
    """Tell whether a published recipe has the miniature's language model write, which needs a grammar to write sentences."""
    return load_recipe(published_recipes()[extends]).prompts.llm.name == MINIATURE

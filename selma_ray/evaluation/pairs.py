"""Human preference: a blinded side-by-side page for raters, and what their choices say.

The page holds each prompt with the images of base and merged in random order and without names; which is which stands in a key
beside it that raters do not get. Human preference is measured this way or not at all: nothing here guesses it.
"""

import csv
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from selma_ray.errors import JudgeError
from selma_ray.evaluation.examples import ImageKey, read_images
from selma_ray.evaluation.statistics import share, sign_test
from selma_ray.evaluation.summary import BASE, MERGED
from selma_ray.pictures import data_uri
from selma_ray.records import content_id
from selma_ray.storage import RunFolder

__all__ = ["DEFAULT_PAIRS", "export_pairs", "read_ratings"]

DEFAULT_PAIRS = 50
_COLUMNS = ("export", "pair", "rater", "choice")
_CHOICES = ("left", "right", "tie")
_MAX_SIDE_PX = 512
_TEMPLATE = "pairs.html.j2"


def export_pairs(folder: RunFolder, evaluation: Mapping[str, Any], count: int, seed: int) -> str:
    """Write pairs/index.html for raters and pairs/key.json for whoever reads their choices; returns the page's path.

    Pairs are drawn evenly from the skills. Raises JudgeError where base and merged have no image in common.
    """
    keys = _shared_images(folder, evaluation["files"])
    if not keys:
        raise JudgeError("pairs: base and merged have no image of the same prompt and seed; run `selma evaluate` again")
    rng = random.Random(seed)
    chosen = _spread(keys, count, rng)
    images = {model: read_images(folder, evaluation["files"][model]["images"], set(chosen)) for model in (BASE, MERGED)}
    pairs, key = [], {}
    for number, image in enumerate(chosen, start=1):
        order = rng.sample((BASE, MERGED), 2)
        pair = f"{number:03d}"
        left, right = (data_uri(images[model][image], _MAX_SIDE_PX) for model in order)
        pairs.append({"pair": pair, "prompt": image[0], "left": left, "right": right})
        key[pair] = {"prompt": image[0], "seed": image[1], "skill": keys[image], "left": order[0], "right": order[1]}
    export = content_id(key=key)[:12]
    small = max(max(image.size) for image in images[BASE].values()) <= 128
    page = _template().render(pairs=pairs, export=export, small=small)
    folder.write_bytes(page.encode(), "pairs", "index.html")
    folder.write_json({"export": export, "pairs": key}, "pairs", "key.json")
    return folder.path("pairs", "index.html")


def read_ratings(folder: RunFolder, files: Sequence[str | Path]) -> dict[str, Any]:
    """Count how often merged was preferred to base in raters' CSV files; writes and returns pairs/result.json.

    Where several people rate a pair, the majority decides, and an even vote is a tie: pairs, not votes, are independent. Raises
    JudgeError for a file of another export, an unknown pair or choice, and a pair that one rater rates twice.
    """
    if not folder.exists("pairs", "key.json"):
        raise JudgeError(
            f"pairs: {folder.uri} holds no exported pairs; run `selma evaluate RECIPE --export-pairs` first"
        )
    key = folder.read_json("pairs", "key.json")
    votes: dict[str, Counter[str]] = {}
    rated: set[tuple[str, str]] = set()
    for file in files:
        for line, row in enumerate(_rows(Path(file)), start=2):
            _check(row, key, rated, f"{file} line {line}")
            rated.add((row["rater"], row["pair"]))
            chosen = "tie" if row["choice"] == "tie" else key["pairs"][row["pair"]][row["choice"]]
            votes.setdefault(row["pair"], Counter())[chosen] += 1
    outcomes = Counter(_majority(of_pair) for of_pair in votes.values())
    wins, losses = outcomes[MERGED], outcomes[BASE]
    decided = share(wins, wins + losses)
    result = {
        "raters": len({rater for rater, _ in rated}),
        "pairs": len(votes),
        "unrated": len(key["pairs"]) - len(votes),
        "wins": wins,
        "ties": outcomes["tie"],
        "losses": losses,
        "share": decided and {"mean": decided.mean, "interval": [decided.low, decided.high], "count": decided.count},
        "p": sign_test(wins, losses),
    }
    folder.write_json(result, "pairs", "result.json")
    return result


def _shared_images(folder: RunFolder, files: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[ImageKey, str]:
    """Return {(prompt, seed): skill} of the images that both models have, in the order of the suite."""
    found = []
    for model in (BASE, MERGED):
        rows = folder.read_table(files[model]["images"], columns=["prompt", "seed", "skill", "error"]).to_pylist()
        found.append({(row["prompt"], row["seed"]): row["skill"] for row in rows if row["error"] is None})
    return {image: skill for image, skill in found[0].items() if image in found[1]}


def _spread(keys: Mapping[ImageKey, str], count: int, rng: random.Random) -> list[ImageKey]:
    """Return `count` images at random, evenly over skills, in random order."""
    by_skill: dict[str, list[ImageKey]] = {}
    for image, skill in keys.items():
        by_skill.setdefault(skill, []).append(image)
    for images in by_skill.values():
        rng.shuffle(images)
    ranked = sorted((rank, skill, image) for skill, images in by_skill.items() for rank, image in enumerate(images))
    chosen = [image for _, _, image in ranked[:count]]
    rng.shuffle(chosen)
    return chosen


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise JudgeError(f"{path} cannot be read ({error}); name the CSV file that the page saved") from None
    missing = [column for column in _COLUMNS if not rows or column not in rows[0]]
    if missing:
        raise JudgeError(
            f"{path} must hold choices in columns {', '.join(_COLUMNS)}; name the CSV file that the page saved"
        )
    return rows


def _check(row: Mapping[str, str], key: Mapping[str, Any], rated: set[tuple[str, str]], place: str) -> None:
    if row["export"] != key["export"]:
        raise JudgeError(
            f"{place}: choices of export {row['export']!r}, this run's is {key['export']!r}; name its own file"
        )
    if row["pair"] not in key["pairs"]:
        raise JudgeError(f"{place}: pair must be one of the exported pairs, got {row['pair']!r}; fix the file")
    if row["choice"] not in _CHOICES:
        raise JudgeError(f"{place}: choice must be {', '.join(_CHOICES)}, got {row['choice']!r}; fix the file")
    if (row["rater"], row["pair"]) in rated:
        raise JudgeError(f"{place}: {row['rater']!r} rates pair {row['pair']} a second time; keep one of the rows")


def _majority(votes: Counter[str]) -> str:
    if votes[BASE] == votes[MERGED] or votes["tie"] > max(votes[BASE], votes[MERGED]):
        return "tie"
    return MERGED if votes[MERGED] > votes[BASE] else BASE


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(_TEMPLATE)

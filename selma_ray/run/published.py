"""The recipes that come with selma_ray, known by their names: `demo` is jobs/recipes/demo.yaml, wherever the package is installed."""

from importlib.resources import files
from pathlib import Path

__all__ = ["about", "published_recipes", "recipe_path"]


def published_recipes() -> dict[str, Path]:
    """Return the files of all recipes and studies by name: of the installed package, or of the repository it is used from."""
    package = Path(str(files("selma_ray")))
    folder = next(filter(Path.is_dir, (package / "recipes", package.parent / "jobs" / "recipes")), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def recipe_path(name: str | Path, beside: Path | None = None) -> str | Path:
    """Return the file that a name means: a path or URI, relative to the folder `beside`, or else a published recipe."""
    path = (beside or Path()) / Path(name).expanduser() if "://" not in str(name) else name
    if isinstance(path, Path) and not path.exists() and Path(name).name == str(name):
        return published_recipes().get(Path(name).stem, path)
    return path


def about(path: Path) -> str:
    """Return what a recipe says of itself: the comment that it begins with, up to its first full stop."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(
        line.lstrip("# ") for line in lines[: next((n for n, line in enumerate(lines) if line[:1] != "#"), 0)]
    )
    return comment.partition(". ")[0].rstrip(".")

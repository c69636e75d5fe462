"""The colours in which one usually meets each object."""

__all__ = ["USUAL_COLOURS"]

# Colours in which one meets an object, the natural one first.
USUAL_COLOURS: dict[str, tuple[str, ...]] = {
    "apple": ("red", "green", "yellow"),
    "banana": ("yellow", "green"),
    "boat": ("blue", "red", "brown"),
    "car": ("red", "blue", "yellow"),
    "cup": ("blue", "red", "green"),
    "fish": ("orange", "blue", "yellow"),
    "flower": ("pink", "red", "purple"),
    "hat": ("brown", "red", "blue"),
    "house": ("brown", "red", "yellow"),
    "mushroom": ("red", "brown"),
    "tree": ("green", "orange"),
    "umbrella": ("purple", "red", "blue"),
}

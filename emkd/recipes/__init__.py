"""The recipes that are installed with emkd, as YAML files beside this module; `--recipe NAME` finds them by name.

Each begins with a comment whose first sentence says in one line what it trains; `emkd recipes` prints these.
"""

import re
from difflib import get_close_matches
from importlib.resources import files

from emkd.errors import InputNotFoundError

_SUFFIX = ".yaml"
_FIRST_SENTENCE = re.compile(r".+?\.(?=\s|$)")


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted."""
    found = (entry.name for entry in files(__name__).iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX))


def recipe_text(name: str) -> str:
    """Return the YAML of a recipe. Raises InputNotFoundError, which names the nearest recipe and all of them."""
    if name not in recipe_names():
        raise InputNotFoundError(f"emkd has no recipe {name!r}{which_recipes(name)}")
    return files(__name__).joinpath(f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """Return the first sentence of a recipe's comment, in one line. Raises InputNotFoundError."""
    comment = recipe_text(name).partition("\n\n")[0].partition("\n#\n")[0]
    sentence = _FIRST_SENTENCE.match(" ".join(line.removeprefix("#").strip() for line in comment.splitlines()))
    return "" if sentence is None else sentence[0]


def which_recipes(name: str) -> str:
    """Return the end of a message about a name that no recipe has: the nearest name, and all names."""
    names = recipe_names()
    close = get_close_matches(name.removesuffix(_SUFFIX), names, n=1)
    nearest = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{nearest} recipes of emkd: {', '.join(names)}"

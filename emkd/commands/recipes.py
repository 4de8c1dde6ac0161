"""`emkd recipes`"""

from typing import Annotated

import typer

from emkd.recipes import recipe_names, recipe_text, summary


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe instead of the list.", autocompletion=recipe_names)
    ] = None,
) -> None:
    """List the recipes of emkd, or print one.

    Use one by its name: emkd train-student --recipe NAME. To change it, write it to a file of your own:
    emkd recipes NAME > mine.yaml.
    """
    if name is not None:
        typer.echo(recipe_text(name), nl=False)
        return
    names = recipe_names()
    width = max(map(len, names))
    for each in names:
        typer.echo(f"{each:<{width}}  {summary(each)}")

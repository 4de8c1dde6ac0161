"""Options that several commands have, and what they all do before they load a model."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    str,
    typer.Option(
        help="Parquet, LLaVA-style JSON/JSONL, WebDataset tars or a save_to_disk folder: a file, a folder, a glob, or "
        "the name of a data set in the hub's local cache."
    ),
]
ImageRoot = Annotated[Path | None, typer.Option(help="Folder that image paths in the data are relative to.")]
FollowLinks = Annotated[
    bool, typer.Option("--follow-links", help="Follow links inside --image-root that lead out of it.")
]
Clock = Annotated[
    str | None,
    typer.Option(
        metavar="DATE",
        help="Day that a chat template with strftime_now writes, as YYYY-MM-DD. (default: today, or the cache's own)",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Revision of a model on the hub.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def loading(what: str) -> None:
    """Say that packages are loaded, which takes seconds. Of several processes (torchrun), one says it."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"loading {what}", err=True)


def no_bars_in_files() -> None:
    """Switch off transformers' progress bars unless stderr is a terminal: in a log file they bury the lines."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()

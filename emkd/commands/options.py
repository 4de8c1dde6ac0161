"""Options that several commands have, and what they all do before they load a model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[str, typer.Option(help="Parquet or LLaVA-style JSON/JSONL: a file, a folder or a glob.")]
ImageRoot = Annotated[Path | None, typer.Option(help="Folder that image paths in the data are relative to.")]
Clock = Annotated[
    str | None,
    typer.Option(
        metavar="DATE",
        help="Day that a chat template with strftime_now writes, as YYYY-MM-DD. (default: today, or the cache's own)",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Revision of a model on the hub.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def no_bars_in_files() -> None:
    """Switch off transformers' progress bars unless stderr is a terminal: in a log file they bury the lines."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()

"""The command line: cache-teacher, train-student, init-student, recipes, inspect, demo (see `emkd.commands`).

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 after Ctrl-C (SIGINT), 143 after SIGTERM.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import emkd
from emkd.commands.inspection import inspect
from emkd.commands.options import loading
from emkd.commands.recipes import recipes
from emkd.commands.student import init_student, train_student
from emkd.commands.teacher import cache_teacher
from emkd.errors import EmkdError, StoppedError
from emkd.interrupt import NAMES, TORCHRUN, exit_code, raising_on_sigterm
from emkd.text import printable_lines

# What an interrupted command leaves, and how to go on. Once train-student trains, it says it itself.
LEFT = {
    "train-student": "this call had not begun to train; what an earlier one saved stays",
    "cache-teacher": "the shards that were committed stay; the same command computes the others",
    "init-student": "nothing may be left that can be used: remove --output, and run the same command again",
    "inspect": "nothing was changed",
    "demo": "what it has made stays in --out, but it starts over: remove that folder, or name another",
}


class Commands(TyperGroup):
    """The commands, each of which says after Ctrl-C or SIGTERM what it left."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            code, left = exit_code(stopped), LEFT.get(ctx.invoked_subcommand or "", "")
            raise StoppedError(f"interrupted by {NAMES[code - 128]}{left and '; ' + left}", code) from None


app = typer.Typer(
    name="emkd",
    cls=Commands,
    help="Distil a vision-language teacher into an efficient student without keeping the teacher in memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("cache-teacher")(cache_teacher)
app.command("train-student")(train_student)
app.command("init-student")(init_student)
app.command("recipes")(recipes)
app.command("inspect")(inspect)


@app.command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything; must be new or empty.")] = Path("demo-out"),
    seeds: Annotated[int, typer.Option(min=1, help="Students per variant.")] = 3,
    ablate: Annotated[bool, typer.Option("--ablate", help="Also train each loss alone, and other matchings.")] = False,
    address: Annotated[str | None, typer.Option(help="Address of a Ray cluster for the teacher's job.")] = None,
) -> None:
    """Run everything on real handwritten digits: data, teacher, cache, students, table. Minutes on a CPU."""
    typer.echo(f"teacher, cache and students in {out}: minutes; --ablate and more --seeds take longer", err=True)
    loading("PyTorch")
    import torch  # noqa: F401  alone, so that a cold start says every few seconds what it is at

    loading("transformers")
    import transformers.modeling_utils  # noqa: F401

    loading("LLaVA")
    from transformers import LlavaForConditionalGeneration  # noqa: F401

    loading("scikit-learn and Ray")
    from emkd.demo import run_demo

    run_demo(out, seeds=seeds, ablate=ablate, address=address)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"emkd {emkd.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: one line on stderr says what went wrong, without a traceback."""
    try:
        with raising_on_sigterm():
            result: Any = app(args=arguments, standalone_mode=False)
    except StoppedError as error:
        if TORCHRUN in os.environ:  # which sends SIGTERM to the other ranks as soon as one has ended
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":  # of several processes (torchrun), one says it
            _leave(str(error), error.exit_code)
        sys.exit(error.exit_code)
    except EmkdError as error:
        _leave(str(error), error.exit_code)
    except OSError as error:  # the disk is full, a folder cannot be written, a file has the name of a folder
        _leave(f"{error}. What was committed or saved stays; fix this and run the same command again", 1)
    except Exception as error:
        if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
            raise
        if not error.format_message():  # no command was named, and the help has been printed
            sys.exit(error.exit_code)
        _leave(f"{error.format_message()} (see --help)", error.exit_code)
    sys.exit(result if isinstance(result, int) else 0)


def _leave(message: str, code: int) -> None:
    typer.echo(f"emkd: {printable_lines(message)}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()

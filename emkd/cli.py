"""The command line: cache-teacher, train-student, init-student, recipes, inspect, demo (see `emkd.commands`).

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (what was committed stays).
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import emkd
from emkd.commands.inspection import inspect
from emkd.commands.recipes import recipes
from emkd.commands.student import init_student, train_student
from emkd.commands.teacher import cache_teacher
from emkd.errors import EmkdError
from emkd.text import printable_lines

INTERRUPTED = 130

app = typer.Typer(
    name="emkd",
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
        result: Any = app(args=arguments, standalone_mode=False)
    except EmkdError as error:
        _leave(str(error), error.exit_code)
    except OSError as error:  # the disk is full, a folder cannot be written, a file has the name of a folder
        _leave(f"{error}. What was committed or saved stays; fix this and run the same command again", 1)
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
            raise
        if not error.format_message():  # no command was named, and the help has been printed
            sys.exit(error.exit_code)
        _leave(f"{error.format_message()} (see --help)", error.exit_code)
    if result == INTERRUPTED:  # typer turns Ctrl-C into this exit code
        _leave(
            "interrupted; what was committed or saved stays. Run the same command again: cache-teacher resumes, "
            "train-student resumes with --resume, other commands start over",
            INTERRUPTED,
        )
    sys.exit(result if isinstance(result, int) else 0)


def _leave(message: str, code: int) -> None:
    typer.echo(f"emkd: {printable_lines(message)}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()

"""The command line: cache-teacher, train-student, init-student, inspect, demo.

Each command imports its room when called, so that `--help` and `inspect` stay instant. Exit codes: 0 done,
1 failed, 2 the call was wrong, 130 interrupted (what was committed stays).
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import emkd
from emkd.errors import EmkdError, UsageError

INTERRUPTED = 130

# Where in a recipe each flag of train-student stands; one that is given goes over the file.
RECIPE_FLAGS = {
    "alpha": "losses.alpha",
    "beta": "losses.beta",
    "gamma": "losses.gamma",
    "divergence": "losses.divergence",
    "temperature": "losses.temperature",
    "tail": "losses.tail",
    "matching": "losses.matching",
    "top_k": "losses.top_k",
    "solver": "losses.solver",
    "vision_pool": "student.vision_pool",
    "freeze": "student.freeze",
    "epochs": "training.num_train_epochs",
    "max_steps": "training.max_steps",
    "batch_size": "training.per_device_train_batch_size",
    "learning_rate": "training.learning_rate",
    "seed": "training.seed",
    "max_skipped": "max_skipped",
}

# Flags of inspect that say nothing without --against-teacher.
LIVE_FLAGS = ("data", "samples", "image_root", "attn_implementation", "revision", "trust_remote_code")

app = typer.Typer(
    name="emkd",
    help="Distil a vision-language teacher into an efficient student without keeping the teacher in memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[str, typer.Option(help="Parquet or LLaVA-style JSON/JSONL: a file, a folder or a glob.")]
ImageRoot = Annotated[Path | None, typer.Option(help="Folder that image paths in the data start from.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a model on the hub.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


@app.command("cache-teacher")
def cache_teacher(
    teacher: Annotated[str, typer.Option(help="The teacher: a folder or a name on the hub.")],
    data: Data,
    cache: Annotated[str, typer.Option(help="Where the cache is made, or gone on with.")],
    image_root: ImageRoot = None,
    top_k: Annotated[int, typer.Option(help="Logits stored of each vision token; 0 stores all.")] = 64,
    answer_top_k: Annotated[int, typer.Option(help="Logits stored of each answer token; 0 stores all.")] = 64,
    precision: Annotated[
        str,
        typer.Option(
            help="Of logits: bfloat16, float16, float32, or smaller and lossy: multiples, step0.1 or step0.2."
        ),
    ] = "bfloat16",
    affinity_precision: Annotated[str, typer.Option(help="int8, float16 or float32.")] = "int8",
    compression: Annotated[str, typer.Option(help="zstd, or lz4: larger and faster to read.")] = "zstd",
    workers: Annotated[int, typer.Option(help="Teachers side by side, as Ray actors.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(help="0 runs the teacher on the CPU.")] = 1,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; default: one of our own.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens of one forward pass.")] = 8192,
    rows_per_shard: Annotated[int, typer.Option(help="Rows that are written and committed together.")] = 256,
    max_length: Annotated[
        int | None, typer.Option(help="Longer samples (tokens) are skipped; default: what the teacher was made for.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="The teacher's: auto, float32, bfloat16 or float16.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="For instance sdpa or eager.")] = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    limit: Annotated[int | None, typer.Option(help="Only the first rows.")] = None,
    for_student: Annotated[
        str | None, typer.Option(help="Find out first whether this student will be able to use the cache.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print size and time of the job, and stop.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Add rows of --data that the cache lacks; what is there stays.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read every byte of the cache first, and make damaged shards anew.")
    ] = False,
    clean: Annotated[bool, typer.Option("--clean", help="Once sealed, remove what killed runs left behind.")] = False,
    max_skipped: Annotated[float, typer.Option(help="Share of rows that may be skipped.")] = 0.01,
) -> None:
    """Run the teacher once over a dataset and store what students need.

    Can be stopped at any time and run again: shards that are committed stay, missing ones are done.

    Ctrl-C once finishes the shards in hand, twice stops at once.
    """
    given = dict(locals())
    from emkd.pipeline import JobSettings, cache_teacher, estimate_job

    settings = JobSettings(**{name: given[name] for name in JobSettings.__dataclass_fields__})
    if dry_run and (repair or clean):
        raise UsageError(
            "--dry-run changes nothing and does not go with --repair or --clean; see `emkd inspect --verify`"
        )
    if dry_run:
        estimate = estimate_job(settings, extend=extend)
        typer.echo(estimate.describe())
        estimate.check_space(cache)
    else:
        made = cache_teacher(settings, extend=extend, repair=repair, clean=clean)
        typer.echo(f"sealed: {made.n_samples} samples in {cache}; look at them with: emkd inspect {cache}")


@app.command("train-student")
def train_student(
    student: Annotated[str, typer.Option(help="The student: a folder or a name on the hub.")],
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder of the trained student; must be new or empty.")],
    cache: Annotated[
        str | None, typer.Option(help="The teacher's cache; only --alpha 1 --beta 0 --gamma 0 needs none.")
    ] = None,
    image_root: ImageRoot = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file; flags given here go over it.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of Sup; 1 - alpha is RLD's. (default 0.5)")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of VSD. (default 0.25)")] = None,
    gamma: Annotated[float | None, typer.Option(help="Weight of VLAD. (default 25)")] = None,
    divergence: Annotated[
        str | None,
        typer.Option(help="What VSD and RLD sum up: reverse_kl, forward_kl or jsd. (default reverse_kl)"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits of VSD and RLD; needs the tail uniform. (default 1)")
    ] = None,
    tail: Annotated[
        str | None, typer.Option(help="What logits not stored look like: bucket or uniform. (default uniform)")
    ] = None,
    matching: Annotated[str | None, typer.Option(help="logits, pooled or random. (default logits)")] = None,
    top_k: Annotated[int | None, typer.Option(help="Use fewer stored logits than the cache has.")] = None,
    solver: Annotated[
        str | None, typer.Option(help="Of assignments: scipy, or cuda where there is a GPU. (default scipy)")
    ] = None,
    vision_pool: Annotated[int | None, typer.Option(help="R: average R x R vision tokens into one.")] = None,
    freeze: Annotated[
        list[str] | None, typer.Option(help="Parameters whose names begin so do not learn; may be repeated.")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Data to evaluate on, in the same formats.")] = None,
    epochs: Annotated[float | None, typer.Option(min=0.001, help="Passes over the data. (default 1)")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples of a micro-batch. (default 8)")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Peak learning rate. (default 2e-5)")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Order of samples, dropout. (default 42)")] = None,
    max_skipped: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of rows that may be of no use. (default 0.01)")
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Train on a cache that is not sealed yet.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output from its last complete checkpoint.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that train together, each with a GPU where there are any.")
    ] = 1,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster for them; default: one of our own.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Train a student from a cache; the teacher is not loaded.

    Everything else is set in --recipe, which takes the fields of transformers.TrainingArguments: docs/training.md.

    A run that was stopped goes on with the same command and --resume, from its last checkpoint (training.save_steps).
    """
    given = dict(locals())
    from emkd.trainer import TrainSettings, load_recipe, train_student, with_flags
    from emkd.trainer.report import rank

    flags = {place: given[name] for name, place in RECIPE_FLAGS.items()}
    flags["student.freeze"] = freeze or None  # no --freeze is not a recipe without frozen modules
    settings = TrainSettings(
        student=student,
        data=data,
        output=output,
        recipe=with_flags(load_recipe(recipe), flags),
        cache=cache,
        image_root=image_root,
        eval_data=eval_data,
        revision=revision,
        trust_remote_code=trust_remote_code,
        partial=partial,
        resume=resume,
        workers=workers,
        address=address,
    )
    _no_bars_in_files()
    metrics = train_student(settings)
    if rank():  # of several processes (torchrun) one says it
        return
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not name.endswith("per_second"))
    typer.echo(f"trained {output}: {shown}")


@app.command("init-student")
def init_student(
    vision_tower: Annotated[str, typer.Option(help="Its vision tower (SigLIP, CLIP): a folder or a name on the hub.")],
    language_model: Annotated[str, typer.Option(help="Its language model: a folder or a name on the hub.")],
    like: Annotated[
        str, typer.Option(help="The teacher-to-be: whose tokenizer, image token and chat template it has.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the student; must be new or empty.")],
    vision_pool: Annotated[int, typer.Option(min=1, help="R: average R x R vision tokens of a tile into one.")] = 2,
    vision_layer: Annotated[int, typer.Option(help="Layer of the vision tower that is taken, from the last.")] = -2,
    seed: Annotated[int, typer.Option(min=0, help="Of the projector, which is random.")] = 42,
) -> None:
    """Make a student of a vision tower, a language model and a new projector: LLaVA-NeXT with averaged tiles.

    It has to be aligned (recipes/phase1-align.yaml) before it can be distilled.
    """
    from emkd.init_student.compose import check_output, compose, save

    _no_bars_in_files()
    check_output(output)
    made = compose(vision_tower, language_model, like, window=vision_pool, layer=vision_layer, seed=seed)
    save(made, output)
    typer.echo(f"made {output}: {made.model.num_parameters():,} parameters in {made.model.dtype}")
    for name, shape in made.random.items():
        typer.echo(f"  random: {name} {list(shape)}")
    for name, count in made.unused.items():
        typer.echo(f"  not used: {count} weights of {name} of {vision_tower}")
    for note in made.notes:
        typer.echo(f"  note: {note}")


def _no_bars_in_files() -> None:
    """In a file, the bars of every checkpoint that is read bury the lines."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


@app.command("inspect")
def inspect(
    uri: Annotated[str, typer.Argument(help="The cache.")],
    sample: Annotated[str | None, typer.Option(help="One sample, by its key, its key's beginning, or its id.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every byte.")] = False,
    against_teacher: Annotated[
        str | None, typer.Option(help="Compare samples with this live teacher: a folder or a name on the hub.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="With --against-teacher: what the cache was made from.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="With --against-teacher: how many, evenly spread. (default 8)")
    ] = None,
    image_root: ImageRoot = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="With --against-teacher: for instance eager. (default: as the cache was made)")
    ] = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")] = False,
) -> None:
    """Print what a cache holds: teacher, data, sizes, retained mass; or one of its samples.

    With --against-teacher: compare some samples with what a live teacher answers now, and fail where it is another one.
    """
    given = dict(locals())
    if against_teacher is not None:
        _compare(given)
        return
    stray = [name for name in LIVE_FLAGS if given[name] not in (None, False)]
    if stray:
        raise UsageError(f"--{stray[0].replace('_', '-')} goes with --against-teacher MODEL, and that is missing")
    from emkd.inspection import inspect_cache, render

    report = inspect_cache(uri, sample=sample, verify_bytes=verify)
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        render(report)
    if report.get("damaged"):
        raise typer.Exit(1)


def _compare(given: dict[str, Any]) -> None:
    """`emkd inspect --against-teacher`."""
    if given["data"] is None:
        raise UsageError("--against-teacher needs the data, to read samples anew: say where with --data DATA")
    if given["sample"] is not None or given["verify"]:
        raise UsageError(
            "--against-teacher picks samples itself and reads what it compares: call it without --sample and --verify"
        )
    from emkd.inspection.compare.against_teacher import LiveSettings, check_agreement, compare_with_teacher
    from emkd.inspection.terminal.comparison import render_comparison

    _no_bars_in_files()
    given["samples"] = given["samples"] or 8
    settings = LiveSettings(**{name: given[name] for name in LiveSettings.__dataclass_fields__})
    report = compare_with_teacher(given["uri"], settings, lambda line: typer.echo(line, err=True))
    if given["as_json"]:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        render_comparison(report)
    check_agreement(report)


@app.command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything; must be new or empty.")] = Path("demo-out"),
    seeds: Annotated[int, typer.Option(min=1, help="Students of each variant.")] = 3,
    ablate: Annotated[bool, typer.Option("--ablate", help="Also each loss alone, and other matchings.")] = False,
    address: Annotated[str | None, typer.Option(help="A Ray cluster for the teacher's job.")] = None,
) -> None:
    """The whole way on real handwritten digits: data, teacher, cache, students, table. A few minutes on a CPU."""
    from emkd.demo import run_demo

    run_demo(out, seeds=seeds, ablate=ablate, address=address)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"emkd {emkd.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: one line on stderr for what went wrong, no traceback."""
    try:
        result: Any = app(args=arguments, standalone_mode=False)
    except EmkdError as error:
        _leave(str(error), error.exit_code)
    except OSError as error:  # a disk that is full, a folder that may not be written, a file in its place
        _leave(f"{error}. What was committed or saved stays; mend this and run the same command again", 1)
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
            raise
        _leave(f"{error.format_message()} (see --help)", error.exit_code)
    if result == INTERRUPTED:  # typer turns Ctrl-C into this exit code
        _leave(
            "interrupted; what was committed or saved stays. cache-teacher goes on with the same command, "
            "train-student with --resume; the others begin again",
            INTERRUPTED,
        )
    sys.exit(result if isinstance(result, int) else 0)


def _leave(message: str, code: int) -> None:
    typer.echo(f"emkd: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()

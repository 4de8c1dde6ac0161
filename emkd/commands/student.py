"""`emkd train-student` and `emkd init-student`"""

from pathlib import Path
from typing import Annotated

import typer

from emkd.commands.choices import PARTS, Divergence, Matching, Solver, Tail
from emkd.commands.options import Clock, Data, FollowLinks, ImageRoot, RemoteCode, Revision, loading, no_bars_in_files
from emkd.commands.paths import check_paths
from emkd.recipes import recipe_names


def train_student(
    student: Annotated[str, typer.Option(help="The student: a folder or a name on the hub.")],
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder of the trained student; must be new or empty.")],
    cache: Annotated[
        str | None, typer.Option(help="The teacher's cache; only --alpha 1 --beta 0 --gamma 0 needs none.")
    ] = None,
    image_root: ImageRoot = None,
    follow_links: FollowLinks = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="A recipe of emkd (`emkd recipes` lists them) or a YAML file; flags override it.",
            autocompletion=recipe_names,
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of Sup; RLD has 1 - alpha. (default 0.5)")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of VSD. (default 0.25)")] = None,
    gamma: Annotated[float | None, typer.Option(help="Weight of VLAD. (default 25)")] = None,
    divergence: Annotated[
        Divergence | None, typer.Option(help="Divergence of VSD and RLD. (default reverse_kl)")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits of VSD and RLD; not with --tail bucket. (default 1)")
    ] = None,
    tail: Annotated[
        Tail | None,
        typer.Option(
            help="Logits that are not stored; auto is codes if the cache has them, else uniform. (default auto)"
        ),
    ] = None,
    matching: Annotated[Matching | None, typer.Option(help="Matching of vision tokens. (default logits)")] = None,
    top_k: Annotated[int | None, typer.Option(help="Use fewer stored logits than the cache has.")] = None,
    solver: Annotated[
        Solver | None, typer.Option(help="Solver of assignments; cuda needs a GPU. (default scipy)")
    ] = None,
    vision_pool: Annotated[int | None, typer.Option(help="R: average R x R vision tokens into one.")] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Do not train {', '.join(PARTS[:-1])} or {PARTS[-1]}, or parameters whose names start with this; "
            "may be repeated.",
            autocompletion=lambda: list(PARTS),
        ),
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Data to evaluate on, in the same formats.")] = None,
    epochs: Annotated[float | None, typer.Option(min=0.001, help="Passes over the data. (default 1)")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples of a micro-batch. (default 8)")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Peak learning rate. (default 2e-5)")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of sample order and dropout. (default 42)")] = None,
    max_skipped: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the rows that may be skipped. (default 0.01)")
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Train on a cache that is not sealed yet.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --output from its last complete checkpoint.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that train together, each with a GPU if there are any.")
    ] = 1,
    shard: Annotated[
        bool | None,
        typer.Option("--shard", help="Divide the student among the workers (FSDP2), instead of a copy on each."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster; by default emkd starts Ray on this machine.")
    ] = None,
    clock: Clock = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Train a student from a cache; the teacher is not loaded.

    Set everything else in --recipe, which takes the fields of transformers.TrainingArguments.

    Ctrl-C (or SIGTERM) saves a checkpoint after the step in hand; pressed twice, it stops at once. The same command
    with --resume goes on from the last checkpoint, also of a run that was killed (training.save_steps).
    """
    check_paths(model=student, data=(data, eval_data), cache=cache, root=image_root)
    loading("PyTorch and transformers")
    from emkd.trainer import TrainSettings, load_recipe, train_student, with_flags
    from emkd.trainer.report import rank

    flags = {  # by their keys in a recipe; a flag that is given overrides the file
        "losses.alpha": alpha,
        "losses.beta": beta,
        "losses.gamma": gamma,
        "losses.divergence": divergence,
        "losses.temperature": temperature,
        "losses.tail": tail,
        "losses.matching": matching,
        "losses.top_k": top_k,
        "losses.solver": solver,
        "student.vision_pool": vision_pool,
        "student.shard": shard,
        "student.freeze": freeze or None,  # no --freeze is not a recipe without frozen modules
        "training.num_train_epochs": epochs,
        "training.max_steps": max_steps,
        "training.per_device_train_batch_size": batch_size,
        "training.learning_rate": learning_rate,
        "training.seed": seed,
        "max_skipped": max_skipped,
    }
    settings = TrainSettings(
        student=student,
        data=data,
        output=output,
        recipe=with_flags(load_recipe(recipe), flags),
        cache=cache,
        image_root=image_root,
        follow_links=follow_links,
        eval_data=eval_data,
        revision=revision,
        trust_remote_code=trust_remote_code,
        partial=partial,
        resume=resume,
        workers=workers,
        address=address,
        clock=clock,
    )
    no_bars_in_files()
    metrics = train_student(settings)
    if rank():  # of several processes (torchrun) only rank 0 prints
        return
    steps = metrics.pop("steps")
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    if steps:
        typer.echo(f"trained {output}: {steps} steps, {shown}")
    else:
        typer.echo(f"nothing was left to train: {output} had all its steps before this call")


def init_student(
    vision_tower: Annotated[str, typer.Option(help="Vision tower (SigLIP, CLIP): a folder or a name on the hub.")],
    language_model: Annotated[str, typer.Option(help="Language model: a folder or a name on the hub.")],
    like: Annotated[
        str, typer.Option(help="The future teacher: tokenizer, image token and chat template come from it.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the student; must be new or empty.")],
    vision_pool: Annotated[int, typer.Option(min=1, help="R: average R x R vision tokens of a tile into one.")] = 2,
    vision_layer: Annotated[int, typer.Option(help="Layer of the vision tower to use, counted from the last.")] = -2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the projector's random weights.")] = 42,
) -> None:
    """Compose a student from a vision tower, a language model and a new projector: LLaVA-NeXT with averaged tiles.

    Align it (train-student --recipe phase1-align) before you distil it.
    """
    from emkd.init_student.compose import check_output, compose, save

    no_bars_in_files()
    check_output(output)
    typer.echo(f"loading {vision_tower} and {language_model}", err=True)
    made = compose(vision_tower, language_model, like, window=vision_pool, layer=vision_layer, seed=seed)
    save(made, output)
    typer.echo(f"made {output}: {made.model.num_parameters():,} parameters in {made.model.dtype}")
    for name, shape in made.random.items():
        typer.echo(f"  random: {name} {list(shape)}")
    for name, count in made.unused.items():
        typer.echo(f"  not used: {count} weights of {name} of {vision_tower}")
    for note in made.notes:
        typer.echo(f"  note: {note}")

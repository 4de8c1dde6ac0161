"""`emkd cache-teacher`"""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from emkd.commands.choices import AffinityForm, AffinityPrecision, Compression, Dtype, LogitsPrecision
from emkd.commands.options import Clock, Data, FollowLinks, ImageRoot, RemoteCode, Revision, loading
from emkd.commands.paths import check_paths
from emkd.errors import UsageError
from emkd.pipeline.settings import JobSettings


def cache_teacher(
    teacher: Annotated[str, typer.Option(help="The teacher: a folder or a name on the hub.")],
    data: Data,
    cache: Annotated[str, typer.Option(help="Folder of the cache: a new one, or one to resume.")],
    image_root: ImageRoot = JobSettings.image_root,
    follow_links: FollowLinks = JobSettings.follow_links,
    top_k: Annotated[
        int | None,
        typer.Option(help="Logits stored per vision token; 0 stores all. (default: 8 with codes, 64 without)"),
    ] = JobSettings.top_k,
    answer_top_k: Annotated[
        int, typer.Option(help="Logits stored per answer token; 0 stores all.")
    ] = JobSettings.answer_top_k,
    logit_error: Annotated[
        str | None,
        typer.Option(
            metavar="X|none",
            help="Store codes of hidden states from which all logits are read with this predicted root mean square "
            "error; none stores no codes. (default: 0.8, or more if that takes over 160 bytes a vision token)",
        ),
    ] = None,
    token_bytes: Annotated[
        int | None,
        typer.Option(help="Most bytes per vision token for ids, logits, tails and codes; the error of codes follows."),
    ] = JobSettings.token_bytes,
    affinity: Annotated[
        AffinityForm,
        typer.Option(help="Affinity: stored, or codes (computed from codes of text and vision tokens: smaller)."),
    ] = JobSettings.affinity,
    head_memory: Annotated[
        int, typer.Option(help="Most MiB of the LM head projected to codes, which readers keep in memory.")
    ] = JobSettings.head_memory,
    precision: Annotated[
        LogitsPrecision, typer.Option(help="Precision of logits; step0.1 and step0.2 round to multiples (smaller).")
    ] = JobSettings.precision,
    affinity_precision: Annotated[
        AffinityPrecision, typer.Option(help="Precision of the affinity.")
    ] = JobSettings.affinity_precision,
    compression: Annotated[
        Compression, typer.Option(help="Compression; lz4 is larger, and faster to read.")
    ] = JobSettings.compression,
    workers: Annotated[int, typer.Option(help="Ray actors, each with its own teacher.")] = JobSettings.workers,
    gpus_per_worker: Annotated[
        float, typer.Option(help="GPUs of each worker; 0 runs the teacher on the CPU.")
    ] = JobSettings.gpus_per_worker,
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster; by default emkd starts Ray on this machine.")
    ] = JobSettings.address,
    batch_tokens: Annotated[
        int, typer.Option(help="Most tokens in one forward pass, padding included.")
    ] = JobSettings.batch_tokens,
    rows_per_shard: Annotated[
        int, typer.Option(help="Rows per shard: they are written and committed together.")
    ] = JobSettings.rows_per_shard,
    max_length: Annotated[
        int | None, typer.Option(help="Skip samples with more tokens. (default: the teacher's limit)")
    ] = JobSettings.max_length,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the teacher; auto is that of its checkpoint.")] = "auto",
    attn_implementation: Annotated[
        str | None, typer.Option(help="Attention of the teacher, for instance sdpa or eager.")
    ] = JobSettings.attn_implementation,
    clock: Clock = JobSettings.clock,
    revision: Revision = JobSettings.revision,
    trust_remote_code: RemoteCode = JobSettings.trust_remote_code,
    limit: Annotated[int | None, typer.Option(help="Use only the first rows.")] = JobSettings.limit,
    for_student: Annotated[
        str | None, typer.Option(help="Check, before the job starts, that this student can use the cache.")
    ] = JobSettings.for_student,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print size and time of the job, and what other settings would cost and lose, and stop."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON object.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Add the rows of --data that the cache lacks; committed rows stay.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read every byte of the cache first, and rewrite damaged shards.")
    ] = False,
    clean: Annotated[
        bool, typer.Option("--clean", help="Remove files that killed jobs left, once the cache is sealed.")
    ] = False,
    max_skipped: Annotated[
        float, typer.Option(help="Share of the rows that may be skipped.")
    ] = JobSettings.max_skipped,
) -> None:
    """Run the teacher once over a dataset and store the outputs that students need.

    You can stop the job at any time and run it again: committed shards stay, missing shards are computed.

    Ctrl-C pressed once finishes the current shards; pressed twice, it stops immediately.
    """
    if dry_run and (repair or clean):
        raise UsageError(
            "--dry-run changes nothing, so leave out --repair and --clean; `emkd inspect --verify` lists the damage"
        )
    if as_json and not dry_run:
        raise UsageError("--json is for --dry-run; `emkd inspect --json` describes a cache")
    check_paths(model=teacher, data=(data,), root=image_root)
    settings = JobSettings(
        teacher=teacher,
        data=data,
        cache=cache,
        image_root=image_root,
        follow_links=follow_links,
        top_k=top_k,
        answer_top_k=answer_top_k,
        logit_error=_logit_error(logit_error),
        token_bytes=token_bytes,
        affinity=affinity,
        head_memory=head_memory,
        precision=precision,
        affinity_precision=affinity_precision,
        compression=compression,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        address=address,
        batch_tokens=batch_tokens,
        rows_per_shard=rows_per_shard,
        max_length=max_length,
        dtype=dtype,
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
        limit=limit,
        max_skipped=max_skipped,
        for_student=for_student,
        clock=clock,
    )
    loading("Ray, PyTorch and transformers")
    if dry_run:
        _dry_run(settings, extend, as_json)
        return
    from emkd.pipeline import cache_teacher as run_job

    before = _seal(cache)
    made = run_job(settings, extend=extend, repair=repair, clean=clean)
    what = "sealed" if before is None or _seal(cache) != before else "nothing was missing, and the cache stays sealed"
    typer.echo(f"{what}: {made.n_samples} samples in {cache}; look at them with: emkd inspect {cache}")


def _seal(cache: str) -> bytes | None:
    """The content of a cache's seal, None if it has none."""
    file = Path(cache) / "seal.json"
    return file.read_bytes() if file.is_file() else None


def _dry_run(settings: JobSettings, extend: bool, as_json: bool) -> None:
    from emkd.inspection.fidelity.choices import measure, with_job
    from emkd.inspection.terminal.choices import render_choices
    from emkd.pipeline import estimate_job

    estimate = estimate_job(settings, extend=extend, measure=measure)
    compared = None if estimate.study is None else with_job(estimate)
    if as_json:
        typer.echo(json.dumps({**estimate.as_dict(), "compared": compared}, indent=2))
    else:
        typer.echo(estimate.describe())
        if compared is not None:
            typer.echo("")
            render_choices(compared)
    estimate.check_skipped()
    estimate.check_space(settings.cache)


def _logit_error(given: str | None) -> "float | Literal['none'] | None":
    if given is None or given == "none":
        return given  # type: ignore[return-value]
    try:
        return float(given)
    except ValueError:
        raise UsageError(f"--logit-error {given!r}: expected a number above 0, or none") from None

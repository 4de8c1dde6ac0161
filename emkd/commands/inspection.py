"""`emkd inspect`"""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from emkd.commands.options import Clock, FollowLinks, ImageRoot, RemoteCode, Revision, no_bars_in_files
from emkd.commands.paths import check_paths
from emkd.errors import UsageError

if TYPE_CHECKING:
    from emkd.inspection.compare.live_teacher import LiveSettings


def inspect(
    uri: Annotated[str, typer.Argument(help="The cache.")],
    sample: Annotated[
        str | None, typer.Option(help="One sample, by its number, its key, the start of its key, or its id.")
    ] = None,
    as_list: Annotated[bool, typer.Option("--list", help="List the samples, a page at a time.")] = False,
    page: Annotated[int | None, typer.Option(min=1, help="With --list: which page. (default 1)")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every byte.")] = False,
    against_teacher: Annotated[
        str | None, typer.Option(help="Compare samples with this live teacher: a folder or a name on the hub.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="With --against-teacher: the data the cache was made from.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="With --against-teacher: how many, evenly spread. (default 8)")
    ] = None,
    image_root: ImageRoot = None,
    follow_links: FollowLinks = False,
    attn_implementation: Annotated[
        str | None, typer.Option(help="With --against-teacher: for instance eager. (default: the cache's own)")
    ] = None,
    clock: Clock = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")] = False,
) -> None:
    """Print what a cache holds: teacher, data, sizes, retained mass; or a list of its samples; or one of them.

    With --against-teacher, compare some samples with the outputs of a live teacher, and fail if they differ by
    more than the tolerance.
    """
    if page is not None and not as_list:
        raise UsageError("--page works only with --list: add that, or leave --page out")
    if against_teacher is None:
        only_live = {  # flags that have no effect without --against-teacher
            "--data": data,
            "--samples": samples,
            "--image-root": image_root,
            "--follow-links": follow_links or None,
            "--attn-implementation": attn_implementation,
            "--clock": clock,
            "--revision": revision,
            "--trust-remote-code": trust_remote_code or None,
        }
        stray = [flag for flag, value in only_live.items() if value is not None]
        if stray:
            raise UsageError(f"{stray[0]} works only with --against-teacher MODEL: add that, or leave {stray[0]} out")
        _show(uri, sample, (page or 1) if as_list else None, verify, as_json)
        return
    if data is None:
        raise UsageError("--against-teacher needs the data that the cache was made from: name it with --data DATA")
    if sample is not None or as_list or verify:
        raise UsageError(
            "--against-teacher chooses its samples and checks all objects it reads: leave out --sample, --list and "
            "--verify"
        )
    check_paths(model=against_teacher, data=(data,), cache=uri, root=image_root)
    from emkd.inspection.compare.live_teacher import LiveSettings

    settings = LiveSettings(
        against_teacher=against_teacher,
        data=data,
        image_root=image_root,
        follow_links=follow_links,
        samples=LiveSettings.samples if samples is None else samples,
        revision=revision,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        clock=clock,
    )
    _compare(uri, settings, as_json)


def _show(uri: str, sample: str | None, page: int | None, verify: bool, as_json: bool) -> None:
    from emkd.inspection import inspect_cache, render

    report = inspect_cache(uri, sample=sample, page=page, verify_bytes=verify)
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        render(report)
    if report.get("damaged"):
        raise typer.Exit(1)


def _compare(uri: str, settings: "LiveSettings", as_json: bool) -> None:
    """`emkd inspect --against-teacher`."""
    from emkd.inspection.compare.against_teacher import check_agreement, compare_with_teacher
    from emkd.inspection.terminal.comparison import render_comparison

    no_bars_in_files()
    report = compare_with_teacher(uri, settings, lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        render_comparison(report)
    check_agreement(report)

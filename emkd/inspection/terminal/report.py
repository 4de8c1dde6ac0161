"""Reports on a terminal: the whole cache, or its damage. `sample` prints a single sample."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emkd.inspection.terminal.listing import render_list
from emkd.inspection.terminal.sample import render_sample
from emkd.text import printable

SAME_COMMAND = "the same cache-teacher command"
FILES_SHOWN = 3
DETAIL_LENGTH = 300  # characters of a skipped row's detail; --json prints all of it


def render(report: dict[str, Any], console: Console | None = None) -> None:
    """Print a report of `inspect_cache`; only long words, long details and long lists of files are cut."""
    console = console or Console(highlight=False, emoji=False, soft_wrap=True)
    if report.get("damaged"):
        _damage(report, console)
    elif "key" in report:
        render_sample(report, console)
    elif "list" in report:
        render_list(report, console)
    else:
        _summary(report, console)


def _damage(report: dict[str, Any], console: Console) -> None:
    uri, damaged = report["uri"], report["damaged"]
    state = {True: "sealed", False: "not sealed", None: "whether it is sealed is unknown"}[report["sealed"]]
    objects = "1 damaged object" if len(damaged) == 1 else f"{len(damaged)} damaged objects"
    console.print(f"{escape(uri)}: {objects} ({state})", style="bold red", soft_wrap=True)
    for damage in damaged:
        console.print(escape(printable(f"  {damage['name']}: {damage['what']}")), style="red", soft_wrap=True)
    console.print()
    if not report["verified"]:
        console.print(
            escape(f"The shards' arrays were not read: `emkd inspect {uri} --verify` reads everything."), soft_wrap=True
        )
    console.print(
        "To repair it, run `emkd cache-teacher ... --repair` with the flags of the first run, which writes the damaged "
        "shards again; or restore the objects from a copy of the cache.",
        soft_wrap=True,
    )


def _summary(report: dict[str, Any], console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _facts(report):
        table.add_row(f"[bold]{name}[/bold]", escape(printable(text)))
    console.print(table)
    console.print()
    console.print(_sizes(report))
    if report["skipped"]:
        console.print()
        console.print(_skipped(report))


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    shards, teacher, data, stored = report["shards"], report["teacher"], report["dataset"], report["stored"]
    state = ("sealed" if report["sealed"] else "NOT SEALED") + (", every byte verified" if report["verified"] else "")
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in report["skipped"].items())
    shared = report["shared_vision_tokens"]
    licence = f", licence {teacher['licence']}" if teacher["licence"] else ""
    return [
        ("cache", f"{report['uri']} ({state}; format {report['format_version']})"),
        *([] if report["sealed"] else [("progress", _progress(report))]),
        ("teacher", f"{teacher['name']} ({teacher['architecture']}, {teacher['dtype']}{licence}; weights "
                    f"{teacher['weights_sha256'][:12]}), V = {report['vocabulary']:,}"),
        ("dataset", f"{_files(data['files'])}: {data['cached_rows']:,} of {data['rows']:,} rows"),
        *((f"extension {i}", f"{_files(e['files'])}: {e['added_rows']:,} of {e['rows']:,} rows added")
          for i, e in enumerate(report["extensions"], 1)),
        ("stored", f"top {stored['top_k']} logits of vision tokens, {stored['answer_top_k']} of answers, "
                   f"{stored['logits']}; affinity {stored['affinity']}; {stored['compression']}"),
        *([("codes", _codes(report))] if report["codes"] else []),
        ("samples", f"{report['samples']:,}" + (f"; skipped: {skipped}" if skipped else "")),
        ("shards", f"{shards['committed']:,} of {shards['planned']:,}"),
        ("tokens", ", ".join(f"{count:,} {name}" for name, count in report["tokens"].items())
                   + (f"; {shared:,} of the vision tokens are stored with another row's" if shared else "")),
        ("dense logits", "none" if report["dense_ratio"] is None else
                         f"would be {report['dense_ratio']:.1f} times larger (all V, bfloat16)"),
        ("retained mass", _masses(report["retained_mass"])),
    ]  # fmt: skip


def _codes(report: dict[str, Any]) -> str:
    codes, error = report["codes"], report["logit_error"]
    measured = "not measured" if error["measured"] is None else f"{error['measured']:.3g} measured"
    return (
        f"{codes['columns']} of {codes['width']} columns, step {codes['step']:.3g}; logit error "
        f"{error['predicted']:.3g} predicted, {measured}; the basis takes {codes['bytes']:,} bytes once"
    )


def _progress(report: dict[str, Any]) -> str:
    """How far the job of an unsealed cache is, and how to continue it."""
    shards, rows = report["shards"], report["rows"]
    if shards["committed"] == shards["planned"]:
        return (
            f"all {shards['planned']:,} shards are committed, only the seal is missing: run {SAME_COMMAND} to write it"
        )
    done = f"{shards['committed']:,} of {shards['planned']:,} shards are committed"
    return (
        f"{done}, with {rows['committed']:,} of {rows['planned']:,} rows; if no job is running, run {SAME_COMMAND} to "
        "continue"
    )


def _files(names: list[str]) -> str:
    more = f" and {len(names) - FILES_SHOWN:,} more" if len(names) > FILES_SHOWN else ""
    return ", ".join(names[:FILES_SHOWN]) + more


def _masses(masses: dict[str, float] | None) -> str:
    if masses is None:
        return "no vision tokens"
    return ", ".join(f"{name} {value:.4f}" for name, value in masses.items()) + " (mean of a sample's vision tokens)"


def _sizes(report: dict[str, Any]) -> Table:
    table = Table("part", box=None, pad_edge=False)
    table.add_column("bytes", justify="right")
    table.add_column("a vision token", justify="right")
    for name, n_bytes in report["bytes"].items():
        each = report["bytes_per_vision_token"][name]
        table.add_row(name, f"{n_bytes:,}", "-" if each is None else f"{each:.1f}")
    return table


def _skipped(report: dict[str, Any]) -> Table:
    """Each reason, how many rows it skipped, and the first of them in detail."""
    table = Table(box=None, pad_edge=False)
    table.add_column("skipped", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("for example", overflow="fold")
    for reason, count in report["skipped"].items():
        example = report["skipped_examples"][reason]
        detail = " ".join(example["detail"].split())
        detail = detail if len(detail) <= DETAIL_LENGTH else detail[:DETAIL_LENGTH] + "..."
        text = f"row {example['row']}, id {example['id'] or 'none'}: {detail}"
        table.add_row(escape(printable(reason)), f"{count:,}", escape(printable(text)))
    return table

"""Reports on a terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WORD_WIDTH = 9


def render(report: dict[str, Any], console: Console | None = None) -> None:
    """Prints a report of `inspect_cache`; nothing is cut but long words of a grid."""
    console = console or Console(highlight=False, soft_wrap=True)
    if report.get("damaged"):
        console.print(f"{report['uri']}: {len(report['damaged'])} damaged objects", style="bold red")
        for damage in report["damaged"]:
            console.print(f"  {escape(damage['name'])}: {escape(damage['what'])}")
    elif "key" in report:
        _sample(report, console)
    else:
        _summary(report, console)


def _summary(report: dict[str, Any], console: Console) -> None:
    shards, teacher, data = report["shards"], report["teacher"], report["dataset"]
    state = "sealed" if report["sealed"] else "NOT SEALED: its job has not finished; run it again"
    if "damaged" in report:
        state += ", every byte verified"
    stored = report["stored"]
    skipped = ", ".join(f"{count} {reason}" for reason, count in report["skipped"].items())
    licence = f", licence {teacher['licence']}" if teacher["licence"] else ""
    rows = [
        ("cache", f"{report['uri']} ({state}; format {report['format_version']})"),
        ("teacher", f"{teacher['name']} ({teacher['architecture']}, {teacher['dtype']}{licence}; weights "
                    f"{teacher['weights_sha256'][:12]}), V = {report['vocabulary']:,}"),
        ("dataset", f"{', '.join(data['files'])}: {data['cached_rows']:,} of {data['rows']:,} rows"),
        ("stored", f"top {stored['top_k']} logits of vision tokens, {stored['answer_top_k']} of answers, "
                   f"{stored['logits']}; affinity {stored['affinity']}"),
        ("samples", f"{report['samples']:,}" + (f"; skipped: {skipped}" if skipped else "")),
        ("shards", f"{shards['committed']:,} of {shards['planned']:,}"),
        ("tokens", ", ".join(f"{count:,} {name}" for name, count in report["tokens"].items())),
        ("dense logits", "none" if report["dense_ratio"] is None else
                         f"would be {report['dense_ratio']:.1f} times larger (all V, bfloat16)"),
        ("retained mass", _masses(report["retained_mass"])),
    ]  # fmt: skip
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(f"[bold]{name}[/bold]", escape(text))
    console.print(table)
    console.print()
    console.print(_sizes(report))


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


def _sample(report: dict[str, Any], console: Console) -> None:
    mass = report["retained_mass"]
    console.print(f"[bold]sample[/bold]  {report['key']}")
    console.print(f"row {report['row']}, id {escape(report['id'] or 'none')}, shard {report['shard']}")
    tokens = ", ".join(f"{count:,} {name}" for name, count in report["tokens"].items())
    console.print(f"tokens: {tokens}" + (f"; retained mass {mass:.4f}" if mass is not None else ""))
    console.print(f"\n{escape(report['text'])}\n")
    for answer in report["answers"]:
        same = "" if answer["said"] == answer["teacher"] else f"   (teacher: {answer['teacher']})"
        console.print(escape(f"  {answer['said']}{same}"))
    for number, image in enumerate(report["images"]):
        console.print(f"\n[bold]image {number}[/bold]  {image['height']} x {image['width']}, likeliest words:")
        for tile in image["words"]:
            for row in tile:
                console.print(" ".join(escape(word[:WORD_WIDTH]).ljust(WORD_WIDTH) for word in row).rstrip())

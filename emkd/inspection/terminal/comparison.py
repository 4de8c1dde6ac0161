"""A comparison with a live teacher on a terminal, without torch."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emkd.text import printable

WIDTH = 100  # no table here is wider
DISTANCES = ("near", "far")
LOSSES = (
    ("vsd", "codes"), ("vsd", "bucket"), ("vsd", "uniform"), ("rld", "codes"), ("rld", "bucket"), ("rld", "uniform"),
    ("vlad", ""), ("vsd_hidden", ""), ("vsd_joint", ""),
)  # fmt: skip
NAMES = {"vsd_hidden": "VSD through the LM head", "vsd_joint": "the same, pairs found"}
NOT_SAME = {
    "weights": "weights",
    "tokenizer": "tokenizer.json (every id means the same)",
    "chat_template": "chat template",
}


def render_comparison(report: dict[str, Any], console: Console | None = None) -> None:
    """Print a report of `compare_with_teacher`."""
    console = console or Console(highlight=False, emoji=False, soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _facts(report):
        facts.add_row(f"[bold]{name}[/bold]", escape(printable(text)))
    console.print(facts)
    console.print()
    _print_whole(_differences(report["differences"]), console)
    console.print()
    if report["agrees"]:
        console.print(
            f"agrees: every quantity is within what a teacher in {report['dtype']} may differ by", soft_wrap=True
        )
        _fidelity(report["fidelity"], console)
    else:
        entries, worst = report["differences"], report["worst"]
        n_wrong = sum(not entry["agrees"] for entry in entries.values())
        text = f"{n_wrong} of {len(entries)} quantities, {_words(worst)} most, in sample {entries[worst]['worst']}"
        console.print(f"DOES NOT AGREE: {text}", style="bold red", soft_wrap=True)


def _print_whole(table: Table, console: Console) -> None:
    """Print past the edge of a narrow terminal: a number that is cut off reads as another number."""
    width, console.width = console.width, max(console.width, WIDTH)
    console.print(table)
    console.width = width


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    samples = report["samples"]
    few = f" (all that cache and data share; {samples['asked']:,} were asked for)"
    shared = few if samples["asked"] > samples["compared"] else f" of {samples['of']:,} that cache and data share"
    other = [text for name, text in NOT_SAME.items() if not report["same"][name]]
    other += [f"image processor ({', '.join(names)})"] if (names := report["image_processor_differs_in"]) else []
    other += [
        f"{name} ({then or 'unknown'}, now {now})" for name, (then, now) in report["versions"].items() if then != now
    ]
    revision = f" {report['revision']}" if report["revision"] else ""
    run = f"{report['dtype']}, {report['attention']} attention, on {report['device']}"
    return [
        ("cache", report["uri"] + ("" if report["sealed"] else " (NOT SEALED: only committed shards are compared)")),
        ("made by", report["made_by"]),
        ("teacher", f"{report['teacher']}{revision} ({run})"),
        (
            "differing",
            "; ".join(other) or "nothing: weights, tokenizer, chat template and image processor are the same",
        ),
        ("samples", f"{samples['compared']:,}{shared}, {samples['with_images']:,} with images"),
    ]


def _differences(entries: dict[str, Any]) -> Table:
    """Mean and largest difference of each: as it is, beyond what the disk rounds, and how much of that is tolerated."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\nlive against cache", no_wrap=True)
    for head in ("difference\nmean", "\nmax", "beyond disk\nmean", "\nmax", "tolerated\nmean", "\nmax"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("\nwithin", no_wrap=True)
    for name, entry in entries.items():
        values = [entry["mean"], entry["largest"], *entry["beyond"].values(), *entry["tolerated"].values()]
        style = None if entry["agrees"] else "bold red"
        verdict = "yes" if entry["agrees"] else "NO"
        table.add_row(_words(name), *(f"{value:.2g}" for value in values), verdict, style=style)
    return table


def _fidelity(found: dict[str, Any], console: Console) -> None:
    """What cutting the teacher does, measured with a synthetic student at two distances from it."""
    console.print()
    if "missing" in found:
        console.print(
            f"what the stored logits do to matching and losses: not computed, {found['missing']}", soft_wrap=True
        )
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stored logits\nagainst all of them", no_wrap=True)
    for name in DISTANCES:
        for head in (f"{name}: loss\nerror", "gradient\ncosine", "gradient\nlength"):
            table.add_column(head, justify="right", no_wrap=True)
    for loss, tail in LOSSES:
        if tail and tail not in found["near"][loss]:
            continue
        table.add_row(
            NAMES.get(loss, loss.upper()) + (f", {tail} tail" if tail else ""),
            *(cell for name in DISTANCES for cell in _cells(found[name][loss][tail] if tail else found[name][loss])),
        )
    _print_whole(table, console)
    for line in _computed_on(found):
        console.print(line, soft_wrap=True)


def _cells(comparison: dict[str, float | None]) -> list[str]:
    error, cosine, norm = (comparison[name] for name in ("loss_error", "gradient_cosine", "gradient_norm_ratio"))
    return [
        "-" if error is None else f"{error:+.2%}",
        "-" if cosine is None else f"{cosine:.4f}",
        "-" if norm is None else f"{norm:.3f}",
    ]


def _computed_on(found: dict[str, Any]) -> list[str]:
    images = found["images"]
    regrets = ", ".join(f"{name} {found[name]['regret']:.4f}" for name in DISTANCES)
    noise = ", ".join(f"{name} {found[name]['noise']}" for name in DISTANCES)
    seen = [f"{i['sample']} ({i['teacher_tokens']:,} of {i['of']:,} vision tokens)" for i in images]
    answers = f"and {sum(i['answers'] for i in images):,} answer tokens"
    return [
        f"\nRegret of the assignment (0 the best, 1 random): {regrets}. Length: 1 is that of the dense gradient.",
        "Pairs are found by the paper's cost (losses.cost: logits).",
        "A smaller --logit-error, or without codes a larger --top-k, brings them closer to dense.",
        "The students are synthetic: this teacher's hidden states, means of four neighbouring vision tokens,",
        f"with noise ({noise}). Computed on the first images of these samples {answers}:",
        *(f"  sample {line}" for line in seen),
    ]


def _words(name: str) -> str:
    return name.replace("_", " ")

"""What a cache keeps of a real language model: pairs, gradients, and what a student learns.

    python -m benchmarks.real_lm [--kinds A B C] [--fit 16] [--held-out 3] [--seeds 3] [--output FILE]

A LLaVA around SmolLM2-135M-Instruct (V = 49,152, d = 576) is the teacher; its vision tokens are of three kinds
(lm/kinds.py), and three students have a quarter of them (lm/students.py). For each kind, emkd's own job caches the
first rows, with its own choice of a basis and affinities from codes, and is then extended by rows that the basis has
not seen; the trainer's own code reads these ("from the cache"). Other settings are tried on the same hidden states. All
figures are of the held-out rows, as means over kinds and students; `raw` has each.

Figures: bytes of a vision token (ids, logits, tails, codes); regret of the pairs (0 the best, 1 random); VSD's error
and the cosine of its gradient through the LM head with the best pairs (hidden) and with those found (joint); RLD's; the
share of the dense teacher's gain that an adaptor learns from the cache (lm/learning.py); the share of pairs inside of
the student token's own block. `width` has the bytes of codes at equal errors if the model's states are cut to their
first 144 and 288 numbers.

Each kind is a process of its own, two at a time, with one thread.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import BUILD, RESULTS, ROOT, provenance, write_results
from benchmarks.lm.environment import lm_environment

WORK = BUILD / "real-lm"
KINDS = ("A", "B", "C")


def run_kind(kind: str, n_fit: int, n_held_out: int, seeds: int, reuse: bool) -> dict[str, Any]:
    """Return all figures of one kind."""
    from benchmarks.lm.kind import figures_of_kind

    return figures_of_kind(WORK / kind, kind, n_fit, n_held_out, seeds, reuse)


def start(kind: str, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [str(lm_environment()), "-m", "benchmarks.real_lm", "--one", kind]
    command += ["--fit", str(arguments.fit), "--held-out", str(arguments.held_out), "--seeds", str(arguments.seeds)]
    command += ["--reuse"] if arguments.reuse else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the kinds, two at a time. Raises RuntimeError if one fails."""
    waiting, running = list(arguments.kinds), {}
    while waiting or running:
        while waiting and len(running) < 2:
            running[waiting[0]] = start(waiting[0], arguments)
            waiting.pop(0)
        time.sleep(1)
        for kind in [kind for kind, process in running.items() if process.poll() is not None]:
            if running.pop(kind).returncode:
                raise RuntimeError(f"kind {kind} failed; its error is above")
    return {kind: json.loads((WORK / f"{kind}.json").read_text()) for kind in arguments.kinds}


def means(raw: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the means of each setting over kinds and students; of the learnt share, over kinds that have one."""
    names = [
        name for name in next(iter(raw.values()))["settings"] if all(name in by["settings"] for by in raw.values())
    ]
    found: dict[str, dict[str, float | None]] = {}
    for name in names:
        settings = [by["settings"][name] for by in raw.values()]
        students = [figures for one in settings for figures in one["students"].values()]
        found[name] = {"bytes": _mean([one["bytes"] for one in settings])}
        found[name] |= {
            key: _mean([figures[key] for figures in students]) for key in students[0] if key != "in_own_block"
        }
        shares = [share for share in learnt_shares(raw, name).values() if share is not None]
        found[name]["learnt_share"] = _mean(shares) if shares else None
    return found


def learnt_shares(raw: dict[str, Any], name: str) -> dict[str, float | None]:
    """Return, of each kind, the share of the dense teacher's gain that is learnt with a setting, over all seeds.

    None where that was not tried, and where the dense teacher's own student does not gain with every seed: a share of
    nothing says nothing.
    """
    found: dict[str, float | None] = {}
    for kind, by in raw.items():
        whole, own = by["gains"].get("dense", []), by["gains"].get(name, [])
        found[kind] = sum(own) / sum(whole) if own and min(whole) > 0 else None
    return found


def blocks(raw: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return, for each setting that has it, the mean share of pairs in the student token's own block, by cost."""
    found: dict[str, dict[str, float]] = {}
    for name in next(iter(raw.values()))["settings"]:
        settings = [by["settings"][name] for by in raw.values() if name in by["settings"]]
        students = [figures for one in settings for figures in one["students"].values()]
        tables = [figures["in_own_block"] for figures in students if "in_own_block" in figures]
        if tables:
            found[name] = {cost: _mean([table[cost] for table in tables]) for cost in tables[0]}
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def show(found: dict[str, Any]) -> str:
    """Return a table in Markdown."""
    columns = ("bytes", "regret", "vsd_error", "hidden_cosine", "joint_cosine", "rld_cosine", "learnt_share")
    lines = [" | ".join(("setting", *columns)), "---|" * len(columns) + "---"]
    for name, figures in found["real_lm"].items():
        cells = ["-" if figures[key] is None else f"{figures[key]:.3f}" for key in columns]
        lines.append(" | ".join([name, f"{figures['bytes']:.0f}", *cells[1:]]))
    lines += ["", f"learnt share by kind: {found['learnt_by_kind']}"]
    lines += ["", "pairs in the student token's own block, by cost:"]
    lines += [
        f"  {name}: " + ", ".join(f"{cost} {share:.2f}" for cost, share in by.items())
        for name, by in found["in_own_block"].items()
    ]
    lines.append(
        "whole record with --affinity codes, bytes a vision token: "
        + ", ".join(f"{kind} {by['job']['bytes_per_vision_token']:.0f}" for kind, by in found["raw"].items())
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--fit", type=int, default=16, help="rows that the basis is made from")
    parser.add_argument("--held-out", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "real_lm.json")
    parser.add_argument("--reuse", action="store_true", help="keep teachers and caches of an earlier run")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        found = run_kind(arguments.one, arguments.fit, arguments.held_out, arguments.seeds, arguments.reuse)
        (WORK / f"{arguments.one}.json").write_text(json.dumps(found))
        return
    origin = provenance()
    raw = run_all(arguments)
    by_kind = {name: learnt_shares(raw, name) for name in ("default", "top 64")}
    found = {**origin, "real_lm": means(raw), "learnt_by_kind": by_kind, "in_own_block": blocks(raw), "raw": raw}
    print(show(found))
    write_results(arguments.output, found)


if __name__ == "__main__":
    sys.exit(main())

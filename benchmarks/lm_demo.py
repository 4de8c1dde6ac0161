"""A real language model learns to read words in pictures, and students with a quarter of its tokens learn from it.

    python -m benchmarks.lm_demo [--size cpu|gpu] [--seeds N] [--variants ...] [--split test] [--output FILE]

The regime is that of `emkd demo`, around SmolLM2-135M-Instruct (lm/demo/): wide pictures of eight words, a teacher that
pads them and students that stretch them, a first phase without a teacher, a second one with one question for each
picture and a quarter of the answers wrong. Everything but the teacher's training is a call of emkd.

--size cpu keeps the first layers of the language model only, and says so; a run has one thread. --size gpu takes all
layers and needs a GPU; its sizes aim at less than 8 minutes, which nobody has measured yet. Results say "not run" of a
GPU if there was none.

The table warns of a teacher below 85%, whose students say nothing about the method.

Rates and numbers of steps were chosen on validation pictures, where phase 2 at a rate of 7e-4 lost what phase 1 had
taught.

Accuracies are of the test pictures; choices are made with --split validation. --reuse keeps data, teacher, cache and
the student after phase 1 of an earlier run of the same size, with their times; the results name the commit that
prepared them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import BUILD, RESULTS, ROOT, provenance, write_results
from benchmarks.lm.demo.sizes import SIZES, Size
from benchmarks.lm.environment import lm_environment
from emkd.demo.progress import say, timed

WORK = BUILD / "lm-demo"
VARIANTS = ("sft", "rld", "emkd", "emkd-random", "rld+vsd", "emkd-pooled")


def measure(folder: Path, size: Size, seeds: int, variants: list[str], split: str, reuse: bool) -> dict[str, Any]:
    """Run all steps in a folder and return the figures."""
    from benchmarks.lm.demo.students import VARIANTS as LOSSES
    from benchmarks.lm.demo.students import Run

    run, kept = Run(folder, size), folder / "figures.json"
    if not reuse:
        shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"seconds": {}, "processor_seconds": {}}
    if not (folder / "student-start").exists():
        run.make_data()
        with clocked(found, "teacher", "training the teacher"):
            found["teacher_losses"] = run.make_teacher()
        found["prepared"] = {name: provenance()[name] for name in ("commit", "dirty")}
        write_results(kept, found)
    if not (folder / "student-init").exists():
        with clocked(found, "phase 1", "phase 1"):
            run.make_student()
        write_results(kept, found)
    if not (folder / "cache").exists():
        with clocked(found, "cache", "caching the teacher"):
            run.make_cache()
        write_results(kept, found)
    for model in ("teacher", "student-init"):
        found[model] = run.evaluate(model, split)
        say(f"{model}: {found[model]:.3f}")
    found["cache"] = run.cache_figures()
    with clocked(found, "pairs", "judging pairs"):
        found["pairs"] = run.judge_pairs()
    found["students"] = {variant: [] for variant in variants}
    with clocked(found, "students", "phase 2"):
        for seed in range(seeds):
            for variant, accuracies in found["students"].items():
                accuracies.append(run.accuracy_of(LOSSES[variant], seed, split))
                write_results(folder / f"students-{split}.json", found["students"])  # in case the run is stopped
                say(f"  {variant}, seed {seed}: {accuracies[-1]:.3f}")
    return found


@contextmanager
def clocked(found: dict[str, Any], name: str, what: str) -> Iterator[None]:
    """Keep the seconds of a step, and those that the processor worked for this process: others may use it, too."""
    started = time.process_time()
    with timed(found["seconds"], name, what):
        yield
    found["processor_seconds"][name] = round(time.process_time() - started, 1)


def run_here(arguments: argparse.Namespace) -> None:
    """Measure, print the table and write the results; in the environment with the language model."""
    import torch

    from benchmarks.lm.demo.report import table
    from emkd.demo.threads import one_quiet_thread

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "not run"
    if arguments.size == "gpu" and gpu == "not run":
        raise SystemExit("--size gpu: there is no GPU; the results of --size cpu say that it was not run")
    size, origin = SIZES[arguments.size], provenance()
    seeds = size.seeds if arguments.seeds is None else arguments.seeds
    with one_quiet_thread():
        found = measure(WORK / size.name, size, seeds, arguments.variants, arguments.split, arguments.reuse)
    found = {**origin, "size": size.figures(), "split": arguments.split, "gpu": gpu, **found}
    print(table(found, size.describe()))
    write_results(arguments.output, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seeds", type=int, help="of phase 2; the size says how many if this does not")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--reuse", action="store_true", help="keep what an earlier run has trained before phase 2")
    parser.add_argument("--output", type=Path, default=RESULTS / "lm_demo.json")
    arguments = parser.parse_args()
    python = lm_environment()
    if Path(sys.prefix).resolve() == python.parents[1].resolve():
        run_here(arguments)
        return
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [str(python), "-m", "benchmarks.lm_demo", *sys.argv[1:], "--output", str(arguments.output.absolute())]
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()

"""Codes in time and memory: encoding, reading in training order beside the top 64 logits alone, and wide states.

    python -m benchmarks.storage.codes [--rounds 5] [--output benchmarks/results/codes.json]

The records are those of common/synthetic_records.py, cut to 64 logits (the default before there were codes) or to 8
with codes of 340 numbers, whose spread falls off so that they take as many bytes a token as around the language model
of results/real_lm.json at the default error: 44, the mean of its three kinds of vision tokens, and 74, the largest
(text).
`wide` has states of 3,584 numbers, of which 1,500 columns are kept, and samples of 2,916 vision tokens.

Reading: each round starts one process for each cache, which opens it, reads one epoch untimed and then one timed, in
the order of training (read_cache.py), one thread, files in the page cache. Window memory is what two decoded shards
hold. Encoding: CPU time of the codes of 2,916 vision tokens, and of decoding them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.manifests import TOKENIZER, synthetic_manifest
from benchmarks.common.provenance import BUILD, RESULTS, ROOT, provenance, write_results
from benchmarks.common.synthetic_records import N_ANSWER, TILES, V, sample_rows, tile_pool
from emkd.storage import Cache, CapturedRow, Manifest, commit_shard, create_cache
from emkd.storage.arrays.frames import decode_frame, encode_frame
from emkd.storage.basis import Basis
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.codes import CodesAsked
from emkd.storage.shards.writer import ShardWriter

K, SHARDS, PER_SHARD = 64, 4, 64
TOKENS = 2916


@dataclass(frozen=True, kw_only=True)
class Form:
    """How samples are stored. width: of hidden states, 0 for no codes;  columns: of codes;  tiles: of the samples"""

    top_k: int
    width: int = 0
    columns: int = 0
    spread: float = 60.0
    tiles: tuple[int, ...] = TILES

    def spreads(self) -> NDArray[np.float64]:
        """Return the standard deviation of each column, in steps."""
        return np.maximum(self.spread * np.arange(1, self.columns + 1) ** -0.75, 0.3)

    def groups(self) -> tuple[int, ...]:
        """Return the columns of each group, as a basis made from such columns has them."""
        octaves = np.maximum(np.floor(2 * np.log2(self.spreads())), -6)
        return tuple(np.unique(-octaves, return_counts=True)[1].tolist())

    def codes(self, rng: np.random.Generator, n: int) -> NDArray[np.int16]:
        return np.rint(rng.standard_normal((n, self.columns), dtype=np.float32) * self.spreads()).astype(np.int16)


FORMS = {
    "top 64": Form(top_k=64),
    "codes": Form(top_k=8, width=576, columns=340, spread=12.0),
    "codes, text": Form(top_k=8, width=576, columns=340, spread=26.0),
    "wide, top 64": Form(top_k=64, tiles=(4,)),
    "wide, codes": Form(top_k=8, width=3584, columns=1500, spread=100.0, tiles=(4,)),
}


def basis_of(form: Form) -> Basis:
    """Return a basis of that size for a vocabulary of one id: no reader of records needs its numbers."""
    r, one = form.columns, np.float32
    return Basis(
        mean=np.zeros(form.width, one), projection=np.zeros((form.width, r), one),
        reconstruction=np.zeros((form.width, r), one), head=np.zeros((1, r), np.float16), offset=np.zeros(1, one),
        groups=form.groups(), step=0.1, logit_error=0.8,
    )  # fmt: skip


def rows_of(form: Form, n: int) -> Iterator[CapturedRow]:
    pool = tile_pool(K, PER_SHARD * N_ANSWER, BUILD / f"pool-{K}-{PER_SHARD}.npz")
    rng = np.random.default_rng(2)
    for row in sample_rows(pool, n, PER_SHARD, tiles=form.tiles):
        record = row.record
        if record is None or not form.columns:
            yield row
            continue
        vision = record.vision.map(lambda array: array[:, : form.top_k] if array.ndim == 2 else array)
        record = replace(
            record,
            vision=replace(vision, codes=form.codes(rng, len(vision))),
            answer=replace(record.answer, codes=form.codes(rng, len(record.answer))),
        )
        yield replace(row, record=record)


def manifest_of(form: Form) -> tuple[Manifest, bytes | None]:
    plain = synthetic_manifest(SHARDS * PER_SHARD, PER_SHARD, top_k=K, vocabulary=V)
    if not form.columns:
        return plain, None
    data = basis_of(form).to_bytes()
    coded = {
        "top_k": form.top_k,
        "affinity": "stored",
        "codes": CodesAsked(logit_error=0.8),
        "basis": basis_of(form).identity(data),
    }
    return plain.model_copy(update=coded), data


def write(folder: Path, form: Form) -> None:
    manifest, basis = manifest_of(form)
    files = create_cache(folder, manifest, TOKENIZER, basis)
    rows = rows_of(form, SHARDS * PER_SHARD)
    for shard in range(SHARDS):
        writer = ShardWriter(files, shard, "a", manifest)
        for _ in range(PER_SHARD):
            writer.add(next(rows))
        commit_shard(files, writer.finish())
    seal(files)


def read(folder: Path) -> list[dict[str, float]]:
    script = str(Path(__file__).with_name("read_cache.py"))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", script, str(folder), "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    rates: list[dict[str, float]] = json.loads(done.stdout)["epochs"]
    return rates


def codec_ms(form: Form, rounds: int) -> dict[str, float]:
    """Return milliseconds of CPU time to encode and decode the codes of TOKENS tokens, and their bytes a token."""
    # As the capture makes them: the transpose of [r, n].
    codes, groups = np.asfortranarray(form.codes(np.random.default_rng(3), TOKENS)), form.groups()
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    frame, out = b"", np.empty((form.columns, TOKENS), np.int16)
    for _ in range(2 * rounds):
        began = time.process_time()
        frame = encode_frame(codes, groups)
        middle = time.process_time()
        decode_frame("benchmark", frame, groups, out)
        times["encode"].append(middle - began)
        times["decode"].append(time.process_time() - middle)
    return {**{f"{name}_ms": 1000 * median(each) for name, each in times.items()}, "code_bytes": len(frame) / TOKENS}


def measure(work: Path, rounds: int) -> dict[str, Any]:
    """Return rates, memory, sizes, ratios and raw repeats."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in FORMS}
    folders = {name: work / name.replace(", ", "-").replace(" ", "-") for name in FORMS}
    for name, form in FORMS.items():
        if not (folders[name] / "seal.json").exists():
            write(folders[name], form)
    for number in range(rounds):
        for name in sorted(FORMS, reverse=bool(number % 2)):
            runs[name] += read(folders[name])
    rates = {name: median(one["samples_per_s"] for one in each) for name, each in runs.items()}
    found: dict[str, Any] = {}
    for name, form in FORMS.items():
        cache = Cache.open(folders[name])
        totals = cache.totals
        found[name] = {
            "samples_per_s": rates[name],
            "bytes_per_vision_token": sum(totals.n_bytes.values()) / totals.vision_tokens,
            "window_mib": sum(cache.read_shard(shard).n_bytes for shard in (0, 1)) / 2**20,
            **(codec_ms(form, rounds) if form.columns else {}),
        }
    ratios = {
        "codes/top 64": rates["codes"] / rates["top 64"],
        "codes, text/top 64": rates["codes, text"] / rates["top 64"],
        "wide, codes/top 64": rates["wide, codes"] / rates["wide, top 64"],
    }
    return {"codes": found, "ratios": ratios, "columns": {n: f.columns for n, f in FORMS.items()}, "runs": runs}


def show(result: dict[str, Any]) -> str:
    """Return a table in Markdown."""
    lines = [
        "form | samples/s | bytes a vision token | two shards in memory, MiB | encode, ms | decode, ms",
        "---|---|---|---|---|---",
    ]
    for name, one in result["codes"].items():
        times = [f"{one[key]:.1f}" if key in one else "" for key in ("encode_ms", "decode_ms")]
        lines.append(
            f"{name} | {one['samples_per_s']:,.0f} | {one['bytes_per_vision_token']:.0f} | {one['window_mib']:,.0f} | "
            + " | ".join(times)
        )
    return "\n".join([*lines, *(f"{name}: {ratio:.2f}" for name, ratio in result["ratios"].items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=BUILD / "codes")
    parser.add_argument("--output", type=Path, default=RESULTS / "codes.json")
    arguments = parser.parse_args()
    origin = provenance()
    result = measure(arguments.work, arguments.rounds)
    print(show(result))
    write_results(arguments.output, {**origin, **result})


if __name__ == "__main__":
    main()

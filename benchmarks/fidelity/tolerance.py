"""How much of the tolerance of `emkd inspect --against-teacher` the same teacher uses when it runs differently, and how
small a change of its weights exceeds the tolerance.

    OMP_NUM_THREADS=1 python -m benchmarks.fidelity.tolerance

LLaVAs with random weights process rows of noise as the job does, several rows of different lengths in a batch; nothing
is rounded for the disk. Each row is then compared with what a changed teacher computes for that row alone:

    same teacher       unchanged; eager instead of sdpa attention; float32 arithmetic with the weights of a bfloat16 or
                       float16 teacher, or TF32 instead of float32 (inputs and weights of all linear layers and
                       convolutions rounded to 11 significant bits): the most that another device could change
    different teacher  every weight times 1 + p · N(0, 1), or another seed

The figure is the largest difference over all quantities, of means and of largest differences, as a share of the
tolerance: above 1, `emkd inspect` fails. Writes benchmarks/results/tolerance.json.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.provenance import RESULTS, provenance, write_results
from benchmarks.common.random_llava import Shape, Text, Tower, random_model, write_noise
from emkd.inspection.compare.differences import Differences
from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.samples.dataset import Dataset
from emkd.storage.record import Record
from emkd.vlm.loading import VisionLanguageModel
from emkd.vlm.tolerance import UNIT, tolerance

SIDE, PATCH, V = 40, 5, 2000
LAYERS = (2, 24, 48)
TOP_K = 64
OFF = (0.001, 0.003, 0.01, 0.03, 0.1)

Change = Callable[[Any], Any]


def shape(layers: int, dtype: str) -> Shape:
    return Shape(
        text=Text(hidden=256, layers=layers, heads=4, key_value_heads=2, intermediate=768, rows=V + 48),
        tower=Tower(hidden=128, layers=max(2, layers // 2), heads=2, intermediate=256, side=SIDE, patch=PATCH),
        n_tokens=V,
        dtype=getattr(torch, dtype),
    )


def teacher_of(vlm: VisionLanguageModel) -> Teacher:
    settings = CaptureSettings(
        top_k=TOP_K, answer_top_k=TOP_K, logits_precision="float32", batch_tokens=4096, max_length=None
    )
    return Teacher(vlm, settings)


def with_model(vlm: VisionLanguageModel, change: Change) -> Teacher:
    """Return a teacher whose model is a changed copy."""
    model = change(copy.deepcopy(vlm.model))
    return teacher_of(VisionLanguageModel(path=vlm.path, model=model, processor=vlm.processor, n_tokens=vlm.n_tokens))


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


def in_float32(model: Any) -> Any:
    return model.float()


def in_tf32(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.weight.data = _tf32(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: (_tf32(inputs[0]),))
    return model


def _tf32(values: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest value with 10 stored bits of significand, ties to even."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def off(share: float) -> Change:
    """Return a change that multiplies every weight by 1 + share · N(0, 1)."""

    @torch.no_grad()
    def change(model: Any) -> Any:
        generator = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            parameter.mul_((1 + share * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
        return model

    return change


def share_used(teacher: Teacher, dataset: Dataset, records: list[Record], dtype: str) -> dict[str, float]:
    """Return the largest share of the tolerance over all quantities, of means and of largest differences."""
    found = Differences(precision="float32", affinity_precision="float32")
    for row, record in enumerate(records):
        encoded = teacher.encoder(dataset.sample(row))
        found.add(teacher.states(encoded), record, teacher.logits, teacher.chunk, row)
    shares = [(each, tolerance(name, dtype, found.scale(name))) for name, each in found.named()]
    return {
        "mean": max(each.mean_beyond / tolerated.mean for each, tolerated in shares),
        "largest": max(each.beyond / tolerated.largest for each, tolerated in shares),
    }


def measure(layers: int, dtype: str, dataset: Dataset) -> dict[str, dict[str, float]]:
    vlm = random_model(shape(layers, dtype), seed=1, device="cpu")
    rows = teacher_of(vlm).capture(dataset, range(dataset.n_rows))
    records = [row.record for row in rows if row.record is not None]
    if len(records) != dataset.n_rows:
        raise RuntimeError(f"{rows[0].reason}: {rows[0].detail}")
    changes: dict[str, Change] = {"another batch": lambda model: model, "eager attention": eager}
    changes |= {"TF32": in_tf32} if dtype == "float32" else {"float32 arithmetic": in_float32}
    changes |= {f"weights off by {share:.1%}": off(share) for share in OFF}
    found = {name: share_used(with_model(vlm, change), dataset, records, dtype) for name, change in changes.items()}
    other = random_model(shape(layers, dtype), seed=2, device="cpu")
    found["another seed"] = share_used(teacher_of(other), dataset, records, dtype)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6)
    arguments = parser.parse_args()
    origin = provenance()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="emkd-tolerance-") as scratch:
        path = Path(scratch) / "rows.parquet"
        write_noise(path, n=arguments.rows, n_tokens=V, side=SIDE, words=(4, 40))
        for dtype in UNIT:
            for layers in LAYERS:
                found[f"{dtype}, {layers} layers"] = measure(layers, dtype, Dataset(str(path)))
    for case, shares in found.items():
        print(f"\n{case}: share of the tolerance, mean / largest")
        for name, share in shares.items():
            print(f"  {name:22} {share['mean']:8.2f} / {share['largest']:.2f}")
    content = {**origin, "rows": arguments.rows, "share_of_tolerance": found}
    write_results(RESULTS / "tolerance.json", content)


if __name__ == "__main__":
    main()

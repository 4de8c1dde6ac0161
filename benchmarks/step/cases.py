"""The pairs that optimizer_step.py measures: teacher, student, a batch of rows, and its cache.

    demo        the demonstration's sizes and scenes, with random weights
    cpu-larger  a random pair, V = 32,000; 576 vision tokens in the teacher, 144 in the student
    cpu-real    a student of real shapes (0.5B, its tower of 0.4B frozen) and records of real sizes, V = 151,936; a
                small teacher makes them, so the variants with a teacher in memory are not measured
    gpu         random weights of real shapes: a student of 0.5B, a teacher of 7B, V = 151,936; 144 and 729 tokens
    tiny        a pair to try the script with, seconds on one core

In cpu-real and gpu the teacher sees 384 pixels in patches of 14: 27 x 27 = 729 tokens. Windows of 2 do not divide 27,
so the student sees 336 pixels: 24 x 24 patches, averaged 2 x 2 to 144 tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.manifests import synthetic_manifest
from benchmarks.common.random_llava import SO400M, Shape, Text, Tower, demo_teacher, random_model, write_noise
from emkd.demo.scenes import write_scenes
from emkd.demo.variants import RECIPE
from emkd.pipeline.basis_choice import BasisChooser, sample_states
from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.samples.dataset import Dataset
from emkd.storage.index.commit import commit_shard
from emkd.storage.lifecycle.create import create_cache
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.codes import CodesAsked
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.precision import AffinityPrecision, LogitsPrecision
from emkd.storage.shards.writer import write_shard
from emkd.trainer.student.parameters import freeze
from emkd.vlm.codes import Codes
from emkd.vlm.loading import VisionLanguageModel
from emkd.vlm.pooling import pooled

ROWS_NAME, CACHE_NAME, CODES_NAME = "rows.parquet", "cache", "cache-codes"
# Stored logits and logit error of the cache with codes: a small error, so that all columns of the teacher are kept.
CODES_TOP_K, CODES_ERROR = 8, 0.1


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pair and a batch.

    teacher, student: make the model on a device; the student as it trains, pooled and partly frozen
    write_rows:       writes the batch as Parquet
    top_k:            of vision and answer tokens, 0 for all
    autocast:         whether the student computes in bfloat16
    rounds:           timed steps of each variant; `dense`, which takes long, has `dense_rounds`
    memory_runs:      processes that measure the memory of each variant
    variants:         which of variants.py are measured
    """

    teacher: Callable[[str], VisionLanguageModel]
    student: Callable[[str], VisionLanguageModel]
    write_rows: Callable[[Path], object]
    top_k: int
    rounds: int
    dense_rounds: int
    memory_runs: int = 1
    variants: tuple[str, ...] = ("sft", "cache", "codes", "dense", "live")
    autocast: bool = False
    precision: LogitsPrecision = "bfloat16"
    affinity_precision: AffinityPrecision = "int8"

    def uncut(self) -> "Case":
        """Return the same case with every logit stored, everything in float32."""
        return replace(self, top_k=0, precision="float32", affinity_precision="float32")


def demo_student(device: str) -> VisionLanguageModel:
    """Return a copy of the teacher, pooled as the recipe says."""
    vlm = demo_teacher(device)
    vlm.model = pooled(vlm.model, vlm.processor, RECIPE["student"]["vision_pool"])
    return vlm


def random_case(
    teacher: Shape,
    student: Shape,
    *,
    batch: int,
    words: tuple[int, int],
    top_k: int = 64,
    rounds: int,
    dense_rounds: int,
) -> Case:
    """Return a pair with random weights whose student trains all parameters. words: see `write_rows`"""
    side, n_tokens = teacher.tower.side, teacher.n_tokens
    return Case(
        teacher=partial(random_model, teacher, 1),
        student=partial(random_model, student, 2),
        write_rows=partial(write_noise, n=batch, n_tokens=n_tokens, side=side, words=words),
        top_k=top_k,
        autocast=teacher.dtype == torch.bfloat16,
        rounds=rounds,
        dense_rounds=dense_rounds,
    )


def tiny(dtype: torch.dtype) -> Case:
    """Return a pair with three features of `gpu` that `cpu-larger` lacks: padding rows, a tied head, and autocast if
    dtype is bfloat16."""
    tower = Tower(hidden=32, layers=2, heads=2, intermediate=48, side=20, patch=5)
    teacher = Text(hidden=32, layers=2, heads=2, key_value_heads=1, intermediate=64, rows=104)
    return random_case(
        Shape(text=teacher, tower=tower, n_tokens=100, dtype=dtype),
        Shape(text=replace(teacher, hidden=24, rows=100, tied=True), tower=tower, n_tokens=100, pool=2),
        batch=2,
        words=(4, 8),
        top_k=8,
        rounds=2,
        dense_rounds=1,
    )


def _cpu_larger() -> Case:
    tower = Tower(hidden=192, layers=4, heads=4, intermediate=768, side=120, patch=5)
    teacher = Text(hidden=512, layers=8, heads=8, key_value_heads=2, intermediate=1408, rows=32_000)
    student = Text(hidden=256, layers=6, heads=4, key_value_heads=2, intermediate=704, rows=32_000)
    return random_case(
        Shape(text=teacher, tower=tower, n_tokens=32_000),
        Shape(text=student, tower=tower, n_tokens=32_000, pool=2),
        batch=2,
        words=(50, 100),
        rounds=5,
        dense_rounds=3,
    )


# A language model of 0.5B, as real checkpoints have it.
REAL_STUDENT = Shape(
    text=Text(hidden=896, layers=24, heads=14, key_value_heads=2, intermediate=4864, rows=151_936, tied=True),
    tower=replace(SO400M, side=336),
    n_tokens=151_936,
    pool=2,
)


def _frozen_tower(device: str) -> VisionLanguageModel:
    vlm = random_model(REAL_STUDENT, 2, device)
    freeze(vlm.model, ["model.vision_tower"])
    return vlm


def _cpu_real() -> Case:
    tower = Tower(hidden=32, layers=1, heads=2, intermediate=64, side=384, patch=14)
    text = Text(hidden=256, layers=1, heads=4, key_value_heads=1, intermediate=512, rows=151_936)
    case = random_case(
        Shape(text=text, tower=tower, n_tokens=151_936),
        REAL_STUDENT,
        batch=2,
        words=(50, 100),
        rounds=3,
        dense_rounds=0,
    )
    return replace(case, student=_frozen_tower, variants=("sft", "cache", "codes"))


def _gpu() -> Case:
    teacher = Text(hidden=3584, layers=28, heads=28, key_value_heads=4, intermediate=18_944, rows=152_064)
    return random_case(
        Shape(text=teacher, tower=SO400M, n_tokens=151_936, dtype=torch.bfloat16),
        REAL_STUDENT,
        batch=8,
        words=(50, 100),
        rounds=7,
        dense_rounds=5,
    )


CASES: dict[str, Case] = {
    "demo": Case(
        teacher=demo_teacher,
        student=demo_student,
        write_rows=partial(
            write_scenes, n=RECIPE["training"]["per_device_train_batch_size"], pool="train", seed=1, wrong_answers=0.25
        ),
        top_k=8,
        rounds=15,
        dense_rounds=15,
        memory_runs=2,
    ),
    "cpu-larger": _cpu_larger(),
    "cpu-real": _cpu_real(),
    "gpu": _gpu(),
    "tiny": tiny(torch.bfloat16),
}


def write_cache(case: Case, folder: Path, teacher: VisionLanguageModel) -> Manifest:
    """Write the teacher's records of the folder's rows as a sealed cache of one shard."""
    dataset = Dataset(str(folder / ROWS_NAME))
    manifest = _manifest(case, dataset, teacher, _tokenizer(teacher))
    _write(folder / CACHE_NAME, dataset, manifest, Teacher(teacher, CaptureSettings.of(manifest)), None)
    return manifest


def write_codes(case: Case, folder: Path, teacher: VisionLanguageModel) -> None:
    """Write the same with codes: CODES_TOP_K logits of a vision token, and as many of an answer as without."""
    dataset = Dataset(str(folder / ROWS_NAME))
    asked = _manifest(case, dataset, teacher, _tokenizer(teacher)).model_copy(
        update={"top_k": min(CODES_TOP_K, teacher.n_tokens), "codes": CodesAsked(logit_error=CODES_ERROR)}
    )
    capturing = Teacher(teacher, CaptureSettings.of(asked))
    chooser = BasisChooser(capturing, sample_states(capturing, dataset, asked.rows(0)), asked, 1 << 30)
    basis = chooser.basis(chooser.cut(CODES_ERROR))
    capturing.codes = Codes(basis, teacher.device)
    data = basis.to_bytes()
    _write(folder / CODES_NAME, dataset, asked.with_basis(basis.identity(data)), capturing, data)


def _tokenizer(teacher: VisionLanguageModel) -> bytes:
    found: bytes = teacher.processor.tokenizer.backend_tokenizer.to_str().encode()
    return found


def _write(path: Path, dataset: Dataset, manifest: Manifest, teacher: Teacher, basis: bytes | None) -> None:
    files = create_cache(path, manifest, _tokenizer(teacher.vlm), basis)
    rows = teacher.capture(dataset, manifest.rows(0))
    skipped = [f"row {row.hint.row}: {row.reason}: {row.detail}" for row in rows if row.record is None]
    if skipped:
        raise RuntimeError(f"{len(skipped)} of the batch's {len(rows)} rows are skipped, expected none: {skipped[0]}")
    commit_shard(files, write_shard(files, 0, "bench", rows, manifest))
    seal(files)


def _manifest(case: Case, dataset: Dataset, teacher: VisionLanguageModel, tokenizer: bytes) -> Manifest:
    return synthetic_manifest(
        dataset.n_rows,
        rows_per_shard=dataset.n_rows,
        top_k=min(case.top_k or teacher.n_tokens, teacher.n_tokens),
        vocabulary=teacher.n_tokens,
        fingerprint=dataset.fingerprint,
        tokenizer=tokenizer,
        lm_head_rows=teacher.model.get_output_embeddings().weight.shape[0],
        logits_precision=case.precision,
        affinity_precision=case.affinity_precision,
        batch_tokens=1 << 16,
    )

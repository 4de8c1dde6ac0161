"""The manifest of a job: it identifies the teacher, its tokenizer, its image processor and the data.

The only module that turns settings (`--precision`) into fields of the manifest (`logits_precision`).
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from emkd.clock import clock, reads_clock, today
from emkd.errors import ModelError, UsageError
from emkd.pipeline.settings import JobSettings
from emkd.samples.dataset import Dataset
from emkd.samples.render import template_of
from emkd.storage.manifest.codes import CodesAsked
from emkd.storage.manifest.manifest import (
    FORMAT_VERSION,
    ImageProcessorIdentity,
    Manifest,
    TeacherIdentity,
    TokenizerIdentity,
)
from emkd.storage.manifest.plan import DatasetFile, DatasetIdentity, ShardPlan
from emkd.vlm.identity import (
    image_processor_settings,
    licence,
    model_config,
    n_ids,
    sha256_of,
    tokenizer_json,
    weights_sha256,
)
from emkd.vlm.loading import load_processor, resolve

WRITERS = ("emkd", "torch", "transformers", "tokenizers", "zarr", "numcodecs", "xxhash", "pyarrow", "ray")


# Stored logits of a vision token, with codes and without.
TOP_K, TOP_K_ALONE = 8, 64
# The logit error of codes, and the bytes of a vision token that it must not exceed, if nothing else is asked for. The
# bytes are what 64 logits take (benchmarks/results/storage.json), the default before there were codes.
LOGIT_ERROR, TOKEN_BYTES = 0.8, 160


def job_manifest(
    settings: JobSettings, dataset: Dataset, format_version: int = FORMAT_VERSION, existing: Manifest | None = None
) -> tuple[Manifest, bytes]:
    """(manifest, tokenizer.json) of a job, from files alone, without loading weights. Its basis is not made yet.

    format_version: of the cache, which also decides the defaults: there are no codes before version 4
    existing: the manifest of the cache, if there is one: its date and, of a tokenizer with gaps, its V are kept

    Raises ModelError, and UsageError if the settings need a newer version.
    """
    path = resolve(settings.teacher, settings.revision)
    processor = load_processor(path, settings.trust_remote_code)
    tokenizer = tokenizer_json(path)
    n_tokens = _n_tokens(processor, existing)
    config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    text_config = config.get_text_config()
    pixels = image_processor_settings(processor)
    n_rows = dataset.n_rows if settings.limit is None else min(settings.limit, dataset.n_rows)
    codes = _codes_asked(settings, n_tokens, format_version)
    top_k = settings.top_k if settings.top_k is not None else TOP_K_ALONE if codes is None else TOP_K
    manifest = Manifest(
        format_version=format_version,
        teacher=TeacherIdentity(
            name=settings.teacher if not Path(settings.teacher).is_dir() else path.resolve().name,
            revision=settings.revision,
            weights_sha256=weights_sha256(path),
            dtype=_dtype(path, settings.dtype),
            architecture=config.model_type,
            licence=licence(path),
            attn_implementation=settings.attn_implementation,
            config=model_config(path),
        ),
        image_processor=ImageProcessorIdentity(
            class_name=type(processor.image_processor).__name__, sha256=sha256_of(pixels), settings=pixels
        ),
        tokenizer=TokenizerIdentity(
            sha256=sha256_of(json.loads(tokenizer)),
            n_tokens=n_tokens,
            lm_head_rows=int(text_config.vocab_size),
            chat_template_sha256=sha256_of(processor.chat_template),
            chat_template=template_of(processor),
        ),
        top_k=min(top_k or n_tokens, n_tokens),
        answer_top_k=min(settings.answer_top_k or n_tokens, n_tokens),
        logits_precision=settings.precision,
        affinity_precision=settings.affinity_precision,
        compression=settings.compression,
        affinity=settings.affinity if format_version >= 4 else None,
        codes=codes,
        batch_tokens=settings.batch_tokens,
        max_length=settings.max_length or getattr(text_config, "max_position_embeddings", None),
        clock=_clock(settings, template_of(processor), existing),
        dataset=_dataset_identity(dataset),
        plan=ShardPlan.of(n_rows=n_rows, rows_per_shard=settings.rows_per_shard),
        created_by={name: version(name) for name in WRITERS},
    )
    return manifest, tokenizer


def _n_tokens(processor: Any, existing: Manifest | None) -> int:
    """V: the largest id + 1. A cache that was started when emkd took the number of ids for it keeps that."""
    counted = len(processor.tokenizer)
    return counted if existing is not None and existing.vocabulary_size == counted else n_ids(processor.tokenizer)


def _clock(settings: JobSettings, template: str | None, existing: Manifest | None) -> str | None:
    """The date that the chat template writes in this cache; None if it writes none, or if the cache does not know."""
    if existing is not None:
        return existing.clock
    if not reads_clock(template):
        return None
    return today() if settings.clock is None else clock(settings.clock)


def _codes_asked(settings: JobSettings, n_tokens: int, format_version: int) -> CodesAsked | None:
    """What is asked of codes; None if there are to be none, or if all V logits of every token are stored anyway."""
    error, limit = settings.logit_error, settings.token_bytes
    named = limit is not None or settings.affinity == "codes" or isinstance(error, int | float)
    if format_version < 4:
        if named:
            raise UsageError(
                f"the cache is of format version {format_version}, which has no codes: leave out --logit-error, "
                "--token-bytes and --affinity, or name another folder"
            )
        return None
    top_k = TOP_K if settings.top_k is None else settings.top_k
    whole = all(k == 0 or k >= n_tokens for k in (top_k, settings.answer_top_k)) and settings.affinity == "stored"
    if error == "none" or whole:
        if whole and named:
            raise UsageError(
                "all logits of every token are stored, so codes would add nothing: leave out --logit-error and "
                "--token-bytes"
            )
        return None
    if limit is not None and top_k in (0, n_tokens):
        raise UsageError(
            f"--token-bytes {limit} limits what a vision token takes, and --top-k {top_k} stores all logits"
        )
    if error is None and limit is None:
        # Whoever chooses k has chosen what the logits take.
        return CodesAsked(logit_error=LOGIT_ERROR, token_bytes=TOKEN_BYTES if settings.top_k is None else None)
    return CodesAsked(logit_error=error, token_bytes=limit)


def _dtype(path: Path, asked: str) -> str:
    """The dtype that the teacher runs in: `--dtype`, or for auto the dtype of its checkpoint."""
    if asked != "auto":
        return asked
    content = json.loads((path / "config.json").read_text())
    found = content.get("dtype") or content.get("torch_dtype") or content.get("text_config", {}).get("dtype")
    if found is None:
        raise ModelError(f"{path}/config.json names no dtype; name it with --dtype float32, bfloat16 or float16")
    return str(found)


def _dataset_identity(dataset: Dataset) -> DatasetIdentity:
    return DatasetIdentity(
        fingerprint=dataset.fingerprint,
        n_rows=dataset.n_rows,
        files=tuple(DatasetFile(name=f.name, n_rows=f.n_rows, n_bytes=f.n_bytes) for f in dataset.files),
    )

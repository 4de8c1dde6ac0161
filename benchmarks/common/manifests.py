"""Manifests of caches that no teacher made."""

from typing import Any

from emkd.storage.manifest.manifest import ImageProcessorIdentity, Manifest, TeacherIdentity, TokenizerIdentity
from emkd.storage.manifest.plan import DatasetFile, DatasetIdentity, ShardPlan
from emkd.storage.objects.digest import sha256_hex

NO_SHA256 = "00" * 32
TOKENIZER = b'{"version": "1.0", "model": {"type": "WordLevel"}}'


def synthetic_manifest(
    n_rows: int,
    rows_per_shard: int,
    *,
    top_k: int,
    vocabulary: int,
    files: tuple[DatasetFile, ...] = (),
    fingerprint: str = NO_SHA256,
    tokenizer: bytes = TOKENIZER,
    lm_head_rows: int | None = None,
    **settings: Any,
) -> Manifest:
    """Return a manifest of n_rows rows with the same k for vision and answer tokens.

    files:        of the dataset; default: one file of all rows
    lm_head_rows: default: `vocabulary`
    settings:     other fields of `Manifest`
    """
    return Manifest(
        teacher=TeacherIdentity(name="none", weights_sha256=NO_SHA256, dtype="bfloat16", architecture="none"),
        image_processor=ImageProcessorIdentity(class_name="none", sha256=NO_SHA256, settings={}),
        tokenizer=TokenizerIdentity(
            sha256=sha256_hex(tokenizer), n_tokens=vocabulary, lm_head_rows=lm_head_rows or vocabulary
        ),
        top_k=top_k,
        answer_top_k=top_k,
        **{"batch_tokens": 8192, **settings},
        dataset=DatasetIdentity(
            fingerprint=fingerprint,
            n_rows=n_rows,
            files=files or (DatasetFile(name="synthetic", n_rows=n_rows, n_bytes=0),),
        ),
        plan=ShardPlan.of(n_rows=n_rows, rows_per_shard=rows_per_shard),
    )

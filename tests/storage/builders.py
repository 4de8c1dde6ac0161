"""Small caches of random but valid records, made without a teacher."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from emkd.storage.basis import Basis
from emkd.storage.cache import create_cache
from emkd.storage.index.commit import commit_shard
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.codes import CodesAsked
from emkd.storage.manifest.manifest import (
    ImageProcessorIdentity,
    Manifest,
    TeacherIdentity,
    TokenizerIdentity,
)
from emkd.storage.manifest.plan import DatasetFile, DatasetIdentity, ShardPlan
from emkd.storage.objects.digest import sha256_hex
from emkd.storage.objects.local import LocalFiles
from emkd.storage.precision import round_logits
from emkd.storage.record import CapturedRow, ImageSpan, Record, RowHint, TopLogits
from emkd.storage.shards.writer import write_shard

TOP_FIELDS = ("ids", "logits", "tail_logsumexp", "tail_mean", "codes")
TOKENIZER_JSON = b'{"version": "1.0", "model": {"type": "WordLevel"}}'
V = 40


def make_manifest(
    *, n_rows=5, rows_per_shard=2, top_k=4, answer_top_k=3, logits="bfloat16", affinity="int8", n_tokens=V, **changes
):
    manifest = Manifest(
        teacher=TeacherIdentity(name="tiny-teacher", weights_sha256="ab" * 32, dtype="bfloat16", architecture="llava"),
        image_processor=ImageProcessorIdentity(
            class_name="TinyProcessor", sha256="cd" * 32, settings={"size": (336, 336), "mean": [0.5, 0.25]}
        ),
        tokenizer=TokenizerIdentity(
            sha256=sha256_hex(TOKENIZER_JSON),
            n_tokens=n_tokens,
            lm_head_rows=n_tokens + 24,
            chat_template_sha256="01" * 32,
        ),
        top_k=top_k,
        answer_top_k=answer_top_k,
        logits_precision=logits,
        affinity_precision=affinity,
        batch_tokens=1024,
        dataset=DatasetIdentity(
            fingerprint="f" * 64,
            n_rows=n_rows,
            files=(DatasetFile(name="train.parquet", n_rows=n_rows, n_bytes=123),),
        ),
        plan=ShardPlan.of(n_rows=n_rows, rows_per_shard=rows_per_shard),
        created_by={"emkd": "0.1.0"},
    )
    return manifest.model_copy(update=changes)


def make_basis(groups=(2, 3), *, width=6, n_tokens=V, step=0.25, logit_error=0.5, seed=0):
    """A basis of random numbers."""
    rng, r = np.random.default_rng(seed), sum(groups)
    return Basis(
        mean=rng.normal(size=width).astype(np.float32),
        projection=rng.normal(size=(width, r)).astype(np.float32),
        reconstruction=rng.normal(size=(width, r)).astype(np.float32),
        head=rng.normal(size=(n_tokens, r)).astype(np.float16),
        offset=rng.normal(size=n_tokens).astype(np.float32),
        groups=groups,
        step=step,
        logit_error=logit_error,
    )


BASIS = make_basis()


def coded_manifest(*, affinity="stored", basis=BASIS, **settings):
    """The manifest of a cache with codes."""
    codes = {"affinity": affinity, "codes": CodesAsked(logit_error=0.5), "basis": basis.identity(basis.to_bytes())}
    return make_manifest(**settings).model_copy(update=codes)


def some_codes(rng, n, manifest):
    """Codes whose columns descend in spread."""
    r = manifest.basis.n_columns
    return np.rint(rng.normal(size=(n, r)) * 300 / 4.0 ** np.arange(r)).astype(np.int16)


def top_k_of(logits, k):
    """Naive reference: the k largest of each row [n, V], ties to the smaller id, and the tail's numbers."""
    n = len(logits)
    ids, values = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    tail_logsumexp, tail_mean = np.empty(n, np.float32), np.empty(n, np.float32)
    for i, row in enumerate(logits):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        ids[i], values[i] = order[:k], row[order[:k]]
        tail = row[order[k:]].astype(np.float64)
        tail_logsumexp[i] = np.log(np.exp(tail).sum()) if len(tail) else -np.inf
        tail_mean[i] = tail.mean() if len(tail) else 0
    return TopLogits(ids=ids, logits=values, tail_logsumexp=tail_logsumexp, tail_mean=tail_mean)


def make_record(rng, manifest, *, n_text=6, image_sizes=(5,), n_answer=2, key=None):
    n_vision, n_answer = sum(image_sizes), min(n_answer, n_text)
    precision = manifest.logits_precision
    vision = round_logits(rng.normal(0, 3, (n_vision, V)).astype(np.float32), precision)
    answer = round_logits(rng.normal(0, 3, (n_answer, V)).astype(np.float32), precision)
    starts = np.cumsum([0, *image_sizes])
    record = Record(
        key=key or rng.bytes(32).hex(),
        text_ids=rng.integers(0, V, n_text).astype(np.int32),
        images=tuple(
            ImageSpan(
                text_position=min(i, n_text),
                start=int(starts[i]),
                count=count,
                grids=((1, count),) if i % 2 == 0 else (),
                original_size=(30 + i, 40),
            )
            for i, count in enumerate(image_sizes)
        ),
        vision=top_k_of(vision, manifest.top_k),
        affinity=rng.uniform(-1, 1, (n_text, n_vision)).astype(np.float32),
        answer_positions=np.sort(rng.choice(n_text, n_answer, replace=False)).astype(np.int32),
        answer=replace(top_k_of(answer, manifest.answer_top_k), tail_mean=None),
    )
    return record if manifest.codes is None else _with_codes(record, rng, manifest)


def _with_codes(record, rng, manifest):
    def codes(tokens, n):
        return some_codes(rng, n, manifest) if manifest.has_codes(tokens) else None

    return replace(
        record,
        vision=replace(record.vision, codes=codes("vision", len(record.vision))),
        answer=replace(record.answer, codes=codes("answer", len(record.answer))),
        text_codes=codes("text", len(record.text_ids)),
        affinity=record.affinity if manifest.stores_affinity else None,
    )


def content_record(content, manifest, seed=0):
    """The record of a row with this content, a number: the same record in any row."""
    return make_record(np.random.default_rng([seed, content]), manifest, n_text=5 + content, image_sizes=(4, content))


def make_rows(manifest, shard, *, seed=0, skip=(3,), contents=None):
    """The captured rows of a shard, a pure function of the arguments.

    contents: the content of each row of the dataset, None for a row that cannot be read; by default the row's number
    """
    rows = []
    for row in manifest.rows(shard):
        hint = RowHint(row=row, id=f"id-{row}")
        content = row if contents is None else contents[row]
        if content is None:
            skipped = CapturedRow(
                hint=hint, key="", record=None, reason="unreadable", detail="no such file", text_sha256=""
            )
            rows.append(skipped)
            continue
        record, text = content_record(content, manifest, seed), text_sha256(content)
        if content in skip:
            skipped = CapturedRow(
                hint=hint, key=record.key, record=None, reason="no_answer", detail="empty turn", text_sha256=text
            )
            rows.append(skipped)
        else:
            rows.append(CapturedRow(hint=hint, key=record.key, record=record, text_sha256=text))
    return rows


def text_sha256(content):
    """A stand-in for the hash of a row's texts."""
    return sha256_hex(str(content).encode())


def keyed_rows(contents, seed=0):
    """(row, key) of each row of a dataset with these contents, as a dataset gives them."""
    manifest = make_manifest()
    keys = {content: content_record(content, manifest, seed).key for content in set(contents) - {None}}
    return [(row, keys.get(content)) for row, content in enumerate(contents)]


def with_data(manifest, fingerprint, n_rows, *, limit=None, rows_per_shard=2):
    """The manifest of the same settings for another dataset."""
    dataset = DatasetIdentity(
        fingerprint=fingerprint,
        n_rows=n_rows,
        files=(DatasetFile(name=f"{fingerprint[:4]}.parquet", n_rows=n_rows, n_bytes=123),),
    )
    plan = ShardPlan.of(n_rows=n_rows if limit is None else limit, rows_per_shard=rows_per_shard)
    return manifest.model_copy(update={"dataset": dataset, "plan": plan, "extensions": ()})


def make_cache(path: Path, manifest=None, *, shards=None, sealed=True, seed=0, skip=(3,), contents=None) -> LocalFiles:
    manifest = manifest or make_manifest()
    files = create_cache(path, manifest, TOKENIZER_JSON, BASIS.to_bytes() if manifest.basis else None)
    for shard in range(manifest.plan.n_shards) if shards is None else shards:
        rows = make_rows(manifest, shard, seed=seed, skip=skip, contents=contents)
        index = write_shard(files, shard, f"a{shard}", rows, manifest)
        assert commit_shard(files, index)
    if sealed:
        seal(files)
    return files


def row_of(record, row, **changes):
    return CapturedRow(hint=RowHint(row=row, id=f"id-{row}"), key=record.key, record=changed(record, **changes))


def array_fields(record):
    """The arrays of a record by name; the arrays of its logits are "vision_ids" and so on."""
    return {
        "text_ids": record.text_ids,
        "vision_ids": record.vision.ids,
        "vision_logits": record.vision.logits,
        "vision_tail_logsumexp": record.vision.tail_logsumexp,
        "vision_tail_mean": record.vision.tail_mean,
        "affinity": record.affinity,
        "answer_positions": record.answer_positions,
        "answer_ids": record.answer.ids,
        "answer_logits": record.answer.logits,
        "answer_tail_logsumexp": record.answer.tail_logsumexp,
    } | {
        name: array
        for name, array in (
            ("vision_codes", record.vision.codes),
            ("answer_codes", record.answer.codes),
            ("text_codes", record.text_codes),
        )
        if array is not None
    }


def changed(record, **changes):
    """The record with other fields, by the names of `array_fields` or its own."""
    fields = dict(changes)
    for kind in ("vision", "answer"):
        own = {name: fields.pop(f"{kind}_{name}") for name in list(TOP_FIELDS) if f"{kind}_{name}" in fields}
        if own:
            fields[kind] = replace(getattr(record, kind), **own)
    return replace(record, **fields)


def with_image(record, image, source, n):
    """The record with the vision tokens of its image replaced by those of another record's image."""
    mine, theirs = record.images[image], source.images[n]
    assert mine.count == theirs.count
    before, after = slice(0, mine.start), slice(mine.start + mine.count, None)
    image = source.vision.tokens(slice(theirs.start, theirs.start + theirs.count))
    return replace(record, vision=TopLogits.joined([record.vision.tokens(before), image, record.vision.tokens(after)]))

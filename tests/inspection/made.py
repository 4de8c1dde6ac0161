"""Caches of one made-up sample whose numbers a test knows, with words of all kinds; made without a teacher."""

from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from emkd.storage.cache import create_cache
from emkd.storage.index.commit import commit_shard
from emkd.storage.lifecycle.seal import seal
from emkd.storage.objects.digest import sha256_hex
from emkd.storage.record import CapturedRow, ImageSpan, RowHint
from emkd.storage.shards.writer import write_shard
from tests.storage.builders import V, make_manifest, make_record

# Wide characters, a line end alone, a tab and an escape sequence inside, markup, an emoji's name, a long word.
ODD = ("猫が見えます今日は", "\n", "a\tb", "x\x1b[31mred", "[bold]", ":dog:", "incomprehensibilities", "é")
WORDS = (*ODD, *(f"w{n}" for n in range(V - len(ODD))))
TOKENIZER = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="w0")).to_str().encode()


def span(start, count, grids, text_position=1):
    return ImageSpan(text_position=text_position, start=start, count=count, grids=grids, original_size=(336, 448))


def write_cache(path, manifest, rows_of_shards):
    """A sealed cache of these rows, whose tokenizer knows WORDS."""
    identity = manifest.tokenizer.model_copy(update={"sha256": sha256_hex(TOKENIZER)})
    manifest = manifest.model_copy(update={"tokenizer": identity})
    files = create_cache(path, manifest, TOKENIZER)
    for shard, rows in enumerate(rows_of_shards):
        assert commit_shard(files, write_shard(files, shard, "a", rows, manifest))
    seal(files)


def one_sample(path, spans, *, n_text=6, n_answer=2, top_k=4, row_id="it", **changes):
    """A sealed cache at `path` of one sample with these images, affinity in float32; and its record."""
    manifest = make_manifest(n_rows=1, top_k=top_k, answer_top_k=top_k, affinity="float32")
    sizes = tuple(image.count for image in spans)
    record = make_record(np.random.default_rng(0), manifest, n_text=n_text, image_sizes=sizes, n_answer=n_answer)
    record = replace(record, images=tuple(spans), **changes)
    write_cache(path, manifest, [[CapturedRow(hint=RowHint(row=0, id=row_id), key=record.key, record=record)]])
    return record

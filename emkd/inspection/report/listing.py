"""The samples of a cache in pages, and a sample by what the list shows of it."""

from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from emkd.errors import DamagedCacheError, SampleNotFoundError, UsageError
from emkd.storage.cache import Cache
from emkd.storage.objects.digest import NEXT_STEP
from emkd.storage.objects.names import TOKENIZER_NAME
from emkd.storage.record import Record

PAGE = 25  # samples; a page of them fits on a screen, and reads one or two shards
TEXT_LENGTH = 200  # characters of a sample's text

# Marks an image in the text.
IMAGE_SIGN = "⟦image {number}⟧"


def list_samples(cache: Cache, page: int) -> dict[str, Any]:
    """Return one page of the samples in the order of their numbers, from 1: `samples`, `page`, `pages`, and in `list`

        number, id, key;  tokens: {text, vision, answer};  images: how many;  text: its first 200 characters

    Raises SampleNotFoundError if there is no such page, DamagedCacheError if a shard of it cannot be read.
    """
    pages = max(1, -(-cache.n_samples // PAGE))
    if not 1 <= page <= pages:
        raise SampleNotFoundError(f"{cache.files.root}: no page {page}, the samples fill pages 1 to {pages}")
    tokenizer = tokenizer_of(cache)
    numbers = range((page - 1) * PAGE, min(page * PAGE, cache.n_samples))
    listed = [_entry(cache, number, tokenizer) for number in numbers]
    return {"samples": cache.n_samples, "page": page, "pages": pages, "list": listed}


def _entry(cache: Cache, number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    info = cache.sample_info(number)
    text = text_of(cache.record(number), tokenizer)
    return {
        "number": number,
        "id": info.id,
        "key": info.key,
        "tokens": {"text": info.n_text, "vision": info.n_vision, "answer": info.n_answer},
        "images": len(info.images),
        "text": text if len(text) <= TEXT_LENGTH else text[:TEXT_LENGTH] + "...",
    }


def tokenizer_of(cache: Cache) -> Tokenizer:
    """Return the teacher's tokenizer. Raises DamagedCacheError if tokenizer.json is none."""
    try:
        return Tokenizer.from_buffer(cache.tokenizer_json)
    except Exception as error:  # the library raises no class of its own
        where = cache.files.where(TOKENIZER_NAME)
        raise DamagedCacheError(f"{where}: not a tokenizer ({error}). {NEXT_STEP}") from error


def find_by_name_or_number(cache: Cache, text: str) -> int:
    """Return the number of the sample with this key, id, beginning of a key, or number.

    Raises UsageError if the text is the number of one sample and the id of another, and what Cache.find raises.
    """
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
    if number is None or number >= cache.n_samples:
        return cache.find(text)
    try:
        found = cache.find(text)
    except SampleNotFoundError:
        return number
    if found != number:
        raise UsageError(
            f"{cache.files.root}: {text} is the number of sample {cache.sample_key(number)} and the id, or the "
            f"beginning of the key, of sample {cache.sample_key(found)}; name it by its key"
        )
    return found


def text_of(record: Record, tokenizer: Tokenizer) -> str:
    """Return the text tokens decoded, with a sign at the position of each image."""
    cuts = [0, *(span.text_position for span in record.images), len(record.text_ids)]
    parts = []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        parts.append(tokenizer.decode(record.text_ids[start:stop].tolist(), skip_special_tokens=False))
        if number < len(record.images):
            parts.append(IMAGE_SIGN.format(number=number))
    return " ".join(part for part in parts if part)

"""What a cache says of itself: manifest.json, written first and never changed.

Everything here is decided before the teacher's first forward pass, and everything but `created_by` decides
the numbers in the cache: a second run on the same cache must agree with it (`conflicts`). The plan is a
pure function: shard n holds the rows [n * rows_per_shard, min((n + 1) * rows_per_shard, n_rows)) of the
dataset, so that nothing about the division is stored but three numbers.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from emkd.errors import CacheVersionError, DamagedCacheError
from emkd.storage.digest import canonical_json, sha256_hex
from emkd.storage.precision import AffinityPrecision, LogitsPrecision

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"

_UNCOMPARED = "created_by"


def _as_json(value: Any) -> Any:
    """Settings as they come back from disk (tuples as lists), so that written and read compare equal."""
    return json.loads(json.dumps(value, allow_nan=False))


Settings = Annotated[dict[str, Any], BeforeValidator(_as_json)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class TeacherIdentity(_Stored):
    """The model that the numbers come from. `architecture` is its model_type, `dtype` the one it ran in."""

    name: str
    revision: str | None = None
    weights_sha256: str
    dtype: str
    architecture: str
    licence: str | None = None
    attn_implementation: str | None = None


class ImageProcessorIdentity(_Stored):
    """What turned pictures into pixels. `sha256` is of its settings."""

    class_name: str
    sha256: str
    settings: Settings


class TokenizerIdentity(_Stored):
    """n_tokens is V; the LM head may have more rows (padding, cut before anything is stored)."""

    sha256: str
    n_tokens: Positive
    lm_head_rows: Positive
    chat_template_sha256: str | None = None


class DatasetFile(_Stored):
    name: str
    n_rows: Count
    n_bytes: Count


class DatasetIdentity(_Stored):
    fingerprint: str
    n_rows: Count
    files: tuple[DatasetFile, ...]
    image_root: str | None = None


class ShardPlan(_Stored):
    """Which rows make which shard. n_rows is smaller than the dataset's where the run was limited."""

    rows_per_shard: Positive
    n_rows: Count
    n_shards: Count

    @classmethod
    def of(cls, *, n_rows: int, rows_per_shard: int) -> "ShardPlan":
        return cls(rows_per_shard=rows_per_shard, n_rows=n_rows, n_shards=-(-n_rows // rows_per_shard))

    @model_validator(mode="after")
    def _check(self) -> "ShardPlan":
        expected = -(-self.n_rows // self.rows_per_shard)
        if self.n_shards != expected:
            raise ValueError(f"n_shards is {self.n_shards}, expected {expected} for {self.n_rows} rows")
        return self

    def rows(self, shard: int) -> range:
        """The dataset's rows in a shard. ValueError for a shard that the plan does not have."""
        if not 0 <= shard < self.n_shards:
            raise ValueError(f"shard {shard}: the plan has shards 0 to {self.n_shards - 1}")
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.n_rows))


class Manifest(_Stored):
    """See the module. `top_k` ids are stored for a vision token, `answer_top_k` for an answer token."""

    format_version: Positive = FORMAT_VERSION
    teacher: TeacherIdentity
    image_processor: ImageProcessorIdentity
    tokenizer: TokenizerIdentity
    top_k: Positive
    answer_top_k: Positive
    logits_precision: LogitsPrecision = "bfloat16"
    affinity_precision: AffinityPrecision = "int8"
    batch_tokens: Positive
    max_length: Positive | None = None
    dataset: DatasetIdentity
    plan: ShardPlan
    created_by: dict[str, str] = Field(default_factory=dict)  # package -> version; not compared

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        for name in ("top_k", "answer_top_k"):
            if getattr(self, name) > self.vocabulary_size:
                raise ValueError(f"{name} is {getattr(self, name)}, but V is {self.vocabulary_size}")
        if self.plan.n_rows > self.dataset.n_rows:
            raise ValueError(f"plan.n_rows is {self.plan.n_rows}, the dataset has {self.dataset.n_rows}")
        return self

    @property
    def vocabulary_size(self) -> int:
        """V: ids of the teacher's tokenizer."""
        return self.tokenizer.n_tokens

    @property
    def settings_sha256(self) -> str:
        """Hash of all that is compared; each shard's index names it, so no shard joins a foreign cache.

        What is None is left out, so that a later version may add such a field and still read this cache.
        """
        compared = self.model_dump(mode="json", exclude={_UNCOMPARED}, exclude_none=True)
        return sha256_hex(canonical_json(compared))

    def to_bytes(self) -> bytes:
        """The content of manifest.json: indented JSON, keys sorted."""
        value = self.model_dump(mode="json")
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST_NAME) -> "Manifest":
        """Read manifest.json. CacheVersionError for a newer format, DamagedCacheError for anything else."""
        try:
            value = json.loads(data)
        except ValueError as error:
            raise DamagedCacheError(
                f"{where}: not JSON ({error}); restore the file from a copy of the cache"
            ) from error
        version = value.get("format_version") if isinstance(value, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CacheVersionError(
                f"{where}: written in format version {version}; this emkd reads versions up to "
                f"{FORMAT_VERSION}. Install a newer emkd to read this cache"
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise DamagedCacheError(
                f"{where}: not the manifest of a cache: {error}; restore the file from a copy of the cache"
            ) from error


def conflicts(cache: Manifest, run: Manifest) -> list[str]:
    """The settings in which a run differs from the cache that it found, one line for each:
    "teacher.name: cache has 'a', this run 'b'".
    """
    exclude = {_UNCOMPARED}
    pair = (cache.model_dump(mode="json", exclude=exclude), run.model_dump(mode="json", exclude=exclude))
    return list(_differences("", *pair))


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


def _differences(path: str, cache: Any, run: Any) -> Iterator[str]:
    if isinstance(cache, dict) and isinstance(run, dict):
        for name in sorted(cache.keys() | run.keys()):
            inner = f"{path}.{name}" if path else name
            yield from _differences(inner, cache.get(name, _Absent()), run.get(name, _Absent()))
    elif isinstance(cache, list) and isinstance(run, list) and len(cache) == len(run):
        for i, (a, b) in enumerate(zip(cache, run, strict=True)):
            yield from _differences(f"{path}[{i}]", a, b)
    elif cache != run and not (isinstance(cache, _Absent) and isinstance(run, _Absent)):
        yield f"{path}: cache has {_short(cache)}, this run {_short(run)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} entries"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

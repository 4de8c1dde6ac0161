"""What a cache says of itself: manifest.json, written first and never changed.

Everything here is decided before the teacher's first forward pass, and everything but `created_by` decides
the numbers in the cache: a second run on the same cache must agree with it (`conflicts`). In memory a
manifest also has the extensions of the cache (see `plan`), so that it knows every shard.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from emkd.errors import CacheVersionError, DamagedCacheError
from emkd.storage.manifest.plan import DatasetIdentity, Extension, Positive, ShardPlan, Stored
from emkd.storage.objects.digest import canonical_json, sha256_hex
from emkd.storage.objects.names import MANIFEST_NAME
from emkd.storage.precision import AffinityPrecision, LogitsPrecision

FORMAT_VERSION = 3

_UNCOMPARED = "created_by"
_RUNS_DIFFER_IN = {_UNCOMPARED: True, "tokenizer": {"chat_template": True}}  # the template's hash is compared
RESTORE_MANIFEST = "restore the file from a copy, or run the command that began the cache again with --repair"
Compression = Literal["zstd", "lz4"]
ROWS = frozenset({"dataset", "plan"})  # the fields that an extension may have others of


def _as_json(value: Any) -> Any:
    """Settings as they come back from disk (tuples as lists), so that written and read compare equal."""
    return json.loads(json.dumps(value, allow_nan=False))


Settings = Annotated[dict[str, Any], BeforeValidator(_as_json)]


class TeacherIdentity(Stored):
    """The model that the numbers come from. `architecture` is its model_type, `dtype` the one it ran in."""

    name: str
    revision: str | None = None
    weights_sha256: str
    dtype: str
    architecture: str
    licence: str | None = None
    attn_implementation: str | None = None


class ImageProcessorIdentity(Stored):
    """What turned pictures into pixels. `sha256` is of its settings."""

    class_name: str
    sha256: str
    settings: Settings


class TokenizerIdentity(Stored):
    """n_tokens is V; the LM head may have more rows (padding, cut before anything is stored).

    chat_template: the template that the teacher's text was rendered with, for students to read with; None in caches
        that were begun before it was kept. `chat_template_sha256` is of all that the teacher's processor has, and is
        what runs are compared by.
    """

    sha256: str
    n_tokens: Positive
    lm_head_rows: Positive
    chat_template_sha256: str | None = None
    chat_template: str | None = None


class Manifest(Stored):
    """See the module. `top_k` ids are stored for a vision token, `answer_top_k` for an answer token.

    `compression` is of all arrays, and has a part in how they are laid out (see `arrays`). Format version 1 has no such
    field (None).
    `dataset` and `plan` are those that the cache was begun with; `extensions`, in their order, are files of
    their own. Use `shards`, `rows`, `dataset_of` and so on, which know both.
    """

    format_version: Positive = FORMAT_VERSION
    teacher: TeacherIdentity
    image_processor: ImageProcessorIdentity
    tokenizer: TokenizerIdentity
    top_k: Positive
    answer_top_k: Positive
    logits_precision: LogitsPrecision = "bfloat16"
    affinity_precision: AffinityPrecision = "int8"
    compression: Compression | None = "zstd"
    batch_tokens: Positive
    max_length: Positive | None = None
    dataset: DatasetIdentity
    plan: ShardPlan
    created_by: dict[str, str] = Field(default_factory=dict)  # package -> version; not compared
    extensions: tuple[Extension, ...] = Field(default=(), exclude=True)

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        for name in ("top_k", "answer_top_k"):
            if getattr(self, name) > self.vocabulary_size:
                raise ValueError(f"{name} is {getattr(self, name)}, but V is {self.vocabulary_size}")
        if (self.compression is None) != (self.format_version == 1):
            raise ValueError(f"compression is {self.compression} in format version {self.format_version}")
        if self.plan.n_rows > self.dataset.n_rows:
            raise ValueError(f"plan.n_rows is {self.plan.n_rows}, the dataset has {self.dataset.n_rows}")
        return self

    @property
    def vocabulary_size(self) -> int:
        """V: ids of the teacher's tokenizer."""
        return self.tokenizer.n_tokens

    @cached_property
    def shards(self) -> tuple[int, ...]:
        """Numbers of the shards that make up the cache, ascending."""
        if not self.extensions:
            return tuple(range(self.plan.n_shards))
        newest = self.extensions[-1]
        kept = [number for first, last in newest.kept for number in range(first, last)]
        return (*kept, *newest.shards)

    @property
    def n_planned(self) -> int:
        """Shards of all plans, those included that were not kept: the number of the next one."""
        return self.extensions[-1].shards.stop if self.extensions else self.plan.n_shards

    @property
    def datasets(self) -> tuple[DatasetIdentity, ...]:
        """The dataset that the cache was begun with, and that of each extension."""
        return (self.dataset, *(extension.dataset for extension in self.extensions))

    @property
    def n_rows(self) -> int:
        """Rows of all shards."""
        return sum(len(self.rows(shard)) for shard in self.shards)

    def source(self, shard: int) -> int:
        """Which of `datasets` the rows of a shard are from."""
        return next((e.number for e in self.extensions if shard in e.shards), 0)

    def rows(self, shard: int) -> Sequence[int]:
        """The rows of a shard in its dataset, ascending. ValueError for a shard that no plan has."""
        source = self.source(shard)
        return self.extensions[source - 1].rows_of(shard) if source else self.plan.rows(shard)

    def shard_sha256(self, shard: int) -> str:
        """What the index of a shard names, so that no shard joins a foreign cache."""
        return self.plan_hashes[self.source(shard)]

    @property
    def plan_hashes(self) -> tuple[str, ...]:
        """Hash of the manifest, and of the plan of each extension."""
        return (self.settings_sha256, *(extension.plan_sha256 for extension in self.extensions))

    @property
    def plan_sha256(self) -> str:
        """Hash of all that decides what is in the cache, extensions included."""
        return self.plan_hashes[-1]

    @cached_property
    def settings_sha256(self) -> str:
        """Hash of all of manifest.json that is compared.

        What is None is left out, so that a later version may add such a field and still read this cache.
        """
        compared = self.model_dump(mode="json", exclude={_UNCOMPARED}, exclude_none=True)
        return sha256_hex(canonical_json(compared))

    def without_chat_template(self) -> "Manifest":
        """As it was written before caches kept the template."""
        tokenizer = self.tokenizer.model_copy(update={"chat_template": None})
        return self.model_copy(update={"tokenizer": tokenizer})

    def in_format(self, version: int) -> "Manifest":
        """As an older format version has it, in which a cache that was begun so goes on."""
        return self.model_copy(update={"format_version": version} | ({"compression": None} if version == 1 else {}))

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
            raise DamagedCacheError(f"{where}: not JSON ({error}); {RESTORE_MANIFEST}") from error
        version = value.get("format_version") if isinstance(value, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CacheVersionError(
                f"{where}: written in format version {version}; this emkd reads versions up to "
                f"{FORMAT_VERSION}. Install a newer emkd to read this cache"
            )
        try:
            if version == 1:
                value.setdefault("compression", None)
            if isinstance(value, dict) and "extensions" in value:
                raise DamagedCacheError(f"{where}: extensions are files of their own; {RESTORE_MANIFEST}")
            return cls.model_validate(value)
        except ValidationError as error:
            raise DamagedCacheError(f"{where}: not the manifest of a cache: {error}; {RESTORE_MANIFEST}") from error


def conflicts(cache: Manifest, run: Manifest) -> list[str]:
    """The settings in which a run differs from the cache that it found, one line for each:
    "teacher.name: cache has 'a', this run 'b'". A run on the data of an extension agrees as well.
    """
    if any(_extended_by(extension, run) for extension in cache.extensions):
        return setting_conflicts(cache, run)
    return _conflicts(cache, run, _RUNS_DIFFER_IN)


def setting_conflicts(cache: Manifest, run: Manifest) -> list[str]:
    """As `conflicts`, whatever the rows: what a run that extends the cache has to agree in."""
    return _conflicts(cache, run, _RUNS_DIFFER_IN | dict.fromkeys(ROWS, True))


def _conflicts(cache: Manifest, run: Manifest, exclude: dict[str, Any]) -> list[str]:
    run = run.in_format(cache.format_version)
    pair = (cache.model_dump(mode="json", exclude=exclude), run.model_dump(mode="json", exclude=exclude))
    return list(_differences("", *pair))


def _extended_by(extension: Extension, run: Manifest) -> bool:
    asked = (run.dataset, run.plan.n_rows, run.plan.rows_per_shard)
    return asked == (extension.dataset, extension.n_rows, extension.rows_per_shard)


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

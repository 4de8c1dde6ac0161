"""The manifest of a cache: manifest.json, written first and never changed.

Everything here is decided before the teacher's first forward pass, and everything except `created_by` decides the
numbers in the cache: a second run on the same cache must agree with it (see `conflicts`). In memory, a manifest also
holds the extensions of the cache (see `plan`), so that it knows every shard.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from emkd.clock import clock as as_clock
from emkd.errors import CacheVersionError, DamagedCacheError
from emkd.storage.manifest.codes import BasisIdentity, CodesAsked
from emkd.storage.manifest.plan import DatasetIdentity, Extension, Positive, ShardPlan, Stored
from emkd.storage.objects.digest import canonical_json, sha256_hex
from emkd.storage.objects.names import MANIFEST_NAME
from emkd.storage.objects.sizes import MOST_IDS
from emkd.storage.precision import AffinityPrecision, LogitsPrecision

FORMAT_VERSION = 4

UNCOMPARED = "created_by"
RESTORE_MANIFEST = "restore the file from a copy, or run the command that created the cache again with --repair"
Compression = Literal["zstd", "lz4"]
AffinityForm = Literal["stored", "codes"]
# The fields that format version 4 added. They are None in older caches, whose files and hashes do not have them.
NEW_IN_4 = ("affinity", "codes", "basis")
# Optional fields that were added within a format version, as (section or "", name). Where they are None, hashes do not
# have them; of `UNWRITTEN`, files do not have them either.
LATER = {
    "clock": ("", "clock"),
    "config": ("teacher", "config"),
    "chat_template": ("tokenizer", "chat_template"),
}
UNWRITTEN = ("clock", "config")


def _as_json(value: Any) -> Any:
    """Return settings as reading them from disk does (tuples as lists), so that written and read compare equal."""
    return json.loads(json.dumps(value, allow_nan=False))


Settings = Annotated[dict[str, Any], BeforeValidator(_as_json)]
Clock = Annotated[str, AfterValidator(as_clock)]


class TeacherIdentity(Stored):
    """The model that computed the numbers. `architecture` is its model_type, `dtype` the type it ran in.

    config: its config.json, without what the weights' hash or other fields say. None in caches that were started before
            manifests kept it
    """

    name: str
    revision: str | None = None
    weights_sha256: str
    dtype: str
    architecture: str
    licence: str | None = None
    attn_implementation: str | None = None
    config: Settings | None = None


class ImageProcessorIdentity(Stored):
    """The image processor. `sha256` is the hash of its settings."""

    class_name: str
    sha256: str
    settings: Settings


class TokenizerIdentity(Stored):
    """The teacher's tokenizer. The LM head may have more rows than V (padding, cut before anything is stored).

    n_tokens:             V, the tokenizer's largest id + 1; in caches that were started before emkd knew tokenizers
                          with gaps, the number of its ids
    chat_template:        the template that rendered the teacher's text; students render with it, too. None in caches
                          that were started before manifests kept it
    chat_template_sha256: hash of all templates that the teacher's processor has; runs are compared by it
    """

    sha256: str
    n_tokens: Positive
    lm_head_rows: Positive
    chat_template_sha256: str | None = None
    chat_template: str | None = None


class Manifest(Stored):
    """The settings of a cache and all its plans.

    top_k:         stored ids of a vision token
    answer_top_k:  stored ids of an answer token
    compression:   of all arrays; it also decides their layout (see `arrays`). None in format version 1, which lacks
                   this field
    affinity:      whether affinities are stored or follow from codes. None before format version 4: they are stored
    codes:         what was asked for; None if only the k largest logits and their tails are stored
    basis:         of the codes. None without codes, and in a manifest whose preflight has not run yet; such a manifest
                   is never written
    clock:         the date that the chat template writes (`emkd.clock`). None if it writes none, and in caches that
                   were started before manifests kept it
    dataset, plan: those that the cache was started with
    extensions:    in order, read from their own files

    Use `shards`, `rows`, `source` and the other properties, which cover the plan and the extensions.
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
    affinity: AffinityForm | None = None
    codes: CodesAsked | None = None
    basis: BasisIdentity | None = None
    batch_tokens: Positive
    max_length: Positive | None = None
    clock: Clock | None = None
    dataset: DatasetIdentity
    plan: ShardPlan
    created_by: dict[str, str] = Field(default_factory=dict)  # package -> version; not compared
    extensions: tuple[Extension, ...] = Field(default=(), exclude=True)

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        for name in ("top_k", "answer_top_k"):
            if getattr(self, name) > self.vocabulary_size:
                raise ValueError(f"{name} is {getattr(self, name)}, but V is {self.vocabulary_size}")
        if self.vocabulary_size > MOST_IDS:
            raise ValueError(f"V is {self.vocabulary_size}, ids are stored in 24 bits")
        if (self.compression is None) != (self.format_version == 1):
            raise ValueError(f"compression is {self.compression} in format version {self.format_version}")
        newer = [name for name in NEW_IN_4 if getattr(self, name) is not None]
        if self.format_version < 4 and newer:
            raise ValueError(f"{newer[0]} is set in format version {self.format_version}, which does not have it")
        if self.codes is None and (self.basis is not None or self.affinity == "codes"):
            raise ValueError("basis, or affinity from codes, without codes")
        if self.plan.n_rows > self.dataset.n_rows:
            raise ValueError(f"plan.n_rows is {self.plan.n_rows}, the dataset has {self.dataset.n_rows}")
        return self

    @property
    def stores_affinity(self) -> bool:
        """Whether affinities are stored, rather than computed from codes of text and vision tokens."""
        return self.affinity != "codes"

    def has_codes(self, tokens: Literal["text", "vision", "answer"]) -> bool:
        """Return whether the cache has codes of these tokens: not if all V logits of each are stored anyway."""
        if self.codes is None or tokens == "text":
            return self.codes is not None and not self.stores_affinity
        k = self.top_k if tokens == "vision" else self.answer_top_k
        return k < self.vocabulary_size or (tokens == "vision" and not self.stores_affinity)

    @property
    def vocabulary_size(self) -> int:
        """V, the ids that logits are of."""
        return self.tokenizer.n_tokens

    @cached_property
    def shards(self) -> tuple[int, ...]:
        """The shards of the cache, ascending."""
        if not self.extensions:
            return tuple(range(self.plan.n_shards))
        newest = self.extensions[-1]
        kept = [shard for first, last in newest.kept for shard in range(first, last)]
        return (*kept, *newest.shards)

    @property
    def n_planned(self) -> int:
        """The number of shards in all plans, including shards that an extension dropped: the next shard to plan."""
        return self.extensions[-1].shards.stop if self.extensions else self.plan.n_shards

    @property
    def datasets(self) -> tuple[DatasetIdentity, ...]:
        """The dataset that the cache was started with, followed by the dataset of each extension."""
        return (self.dataset, *(extension.dataset for extension in self.extensions))

    @property
    def n_rows(self) -> int:
        """The number of rows of all shards."""
        return sum(map(self.n_rows_of, self.shards))

    def source(self, shard: int) -> int:
        """Return the index in `datasets` of the dataset that a shard's rows are from."""
        return next((e.number for e in self.extensions if shard in e.shards), 0)

    def rows(self, shard: int) -> Sequence[int]:
        """Return the rows of a shard in its dataset, ascending. Raises ValueError if no plan has the shard."""
        source = self.source(shard)
        return self.extensions[source - 1].rows_of(shard) if source else self.plan.rows(shard)

    def n_rows_of(self, shard: int) -> int:
        """Return the number of rows of a shard. Raises ValueError if no plan has the shard."""
        source = self.source(shard)
        return self.extensions[source - 1].n_rows_of(shard) if source else len(self.plan.rows(shard))

    def shard_sha256(self, shard: int) -> str:
        """Return the hash of the plan of a shard. The shard's index names it, so that no shard joins another cache."""
        return self.plan_hashes[self.source(shard)]

    @property
    def plan_hashes(self) -> tuple[str, ...]:
        """Hash of the manifest, followed by the hash of each extension's plan."""
        return (self.settings_sha256, *(extension.plan_sha256 for extension in self.extensions))

    @property
    def plan_sha256(self) -> str:
        """Hash of everything that decides the content of the cache, including extensions."""
        return self.plan_hashes[-1]

    @cached_property
    def settings_sha256(self) -> str:
        """Hash of all fields of manifest.json except `created_by`.

        Fields that are None are left out, so that a later version may add a field and still read this cache.
        """
        compared = self.model_dump(mode="json", exclude={UNCOMPARED}, exclude_none=True)
        return sha256_hex(canonical_json(compared))

    def without(self, *fields: str) -> "Manifest":
        """Return this manifest as emkd wrote it before manifests kept some of their fields (`LATER`)."""
        manifest = self
        for section, name in (LATER[field] for field in fields):
            part = getattr(manifest, section) if section else manifest
            part = part.model_copy(update={name: None})
            manifest = manifest.model_copy(update={section: part}) if section else part
        return manifest

    def lacks(self, field: str) -> bool:
        """Return whether this manifest does not have a field of `LATER`."""
        section, name = LATER[field]
        return getattr(getattr(self, section) if section else self, name) is None

    def in_format(self, version: int) -> "Manifest":
        """Return this manifest in another format version. A cache keeps the version that it was started in."""
        changes: dict[str, Any] = {"format_version": version}
        if version == 1:
            changes["compression"] = None
        if version < 4:
            changes |= dict.fromkeys(NEW_IN_4)
        return self.model_copy(update=changes)

    def with_basis(self, basis: BasisIdentity | None) -> "Manifest":
        """Return this manifest with the basis that a preflight made, or without any."""
        return self.model_copy(update={"basis": basis})

    def to_bytes(self) -> bytes:
        """Return the content of manifest.json: indented JSON, keys sorted.

        Raises ValueError if it asks for codes and has no basis.
        """
        if (self.codes is None) != (self.basis is None):
            raise ValueError("a manifest that asks for codes is written with their basis")
        value = self.model_dump(mode="json", exclude=set(NEW_IN_4) if self.format_version < 4 else None)
        for section, name in (LATER[field] for field in UNWRITTEN if self.lacks(field)):
            (value[section] if section else value).pop(name)
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST_NAME) -> "Manifest":
        """Parse manifest.json.

        Raises CacheVersionError if it is of a newer format, and DamagedCacheError for any other error in it.
        """
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
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
                raise DamagedCacheError(
                    f"{where}: has a field `extensions`, but each extension has its own file; {RESTORE_MANIFEST}"
                )
            found = cls.model_validate(value)
            _ = found.settings_sha256  # of texts that are valid, and of numbers that JSON has
        except (ValidationError, ValueError, RecursionError) as error:
            raise DamagedCacheError(f"{where}: not the manifest of a cache: {error}; {RESTORE_MANIFEST}") from error
        if (found.codes is None) != (found.basis is None):
            raise DamagedCacheError(f"{where}: codes without a basis; {RESTORE_MANIFEST}")
        return found

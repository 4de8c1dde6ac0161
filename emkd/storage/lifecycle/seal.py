"""The seal: the last step of a job writes totals and the hash of everything.

seal.json is an envelope (see `digest`) of `Seal`. It holds the hashes of manifest.json, tokenizer.json, the basis of
codes if there is one, index.parquet (all rows of all shards in plan order) and every index/<n>.parquet, which hold the
hashes of their shards' objects. So the seal stays small, and opening a cache of any size reads few files. It is created
only if absent, and its bytes are a pure function of the committed shards: two processes that seal at the same time
agree. A cache with extensions has a seal and a consolidated index for each (see `manifest/read`); the newest seal
counts.
"""

import json

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError, model_validator

from emkd.errors import CacheConflictError, CacheIncompleteError, DamagedCacheError
from emkd.storage.basis import read_basis
from emkd.storage.index.commit import missing_shards
from emkd.storage.index.committed import Committed, Totals, read_indexes
from emkd.storage.index.table import OK, read_parquet, write_parquet
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.plan import Count, Stored
from emkd.storage.manifest.read import basis_files, count_extensions, manifest_files, read_manifest, read_tokenizer
from emkd.storage.objects.checked import read_existing
from emkd.storage.objects.digest import NEXT_STEP, ObjectDigest, checked, open_envelope, seal_envelope
from emkd.storage.objects.files import Files
from emkd.storage.objects.names import MANIFEST_NAME, TOKENIZER_NAME, index_name, is_plain, seal_name, table_name


class SealedObject(Stored):
    """Size and hash of an object in the seal."""

    n_bytes: Count
    sha256: str

    @classmethod
    def of(cls, digest: ObjectDigest) -> "SealedObject":
        """Return the size and SHA-256 of `digest`."""
        return cls(n_bytes=digest.n_bytes, sha256=digest.sha256)

    @property
    def digest(self) -> ObjectDigest:
        """As an ObjectDigest, without xxh128."""
        return ObjectDigest(n_bytes=self.n_bytes, sha256=self.sha256)


class Seal(Stored):
    """The body of seal.json. n_samples + n_skipped is the number of rows of the plan."""

    n_samples: Count
    n_skipped: Count
    n_shards: Count
    totals: Totals
    objects: dict[str, SealedObject]

    @model_validator(mode="after")
    def _check(self) -> "Seal":
        strange = [name for name in self.objects if not is_plain(name)]
        if strange:
            raise ValueError(f"{strange[0]!r:.80} is not the name of an object")
        return self

    def check(self, files: Files, name: str) -> bytes:
        """Read an object and check it. Raises DamagedCacheError if it is missing, changed, or not in the seal."""
        if name not in self.objects:
            raise DamagedCacheError(f"{files.where(name)}: not in the seal. {NEXT_STEP}")
        return checked(files.where(name), files.read(name), self.objects[name].digest)


def seal(files: Files, committed: Committed | None = None) -> Seal:
    """Seal a cache whose shards are all committed, durably. Returns the seal; a sealed cache keeps its own.

    committed: what `read_indexes` returned just now, with sizes checked; it is read here unless it has all shards

    Contents of shards are not read: see `verify`. Raises InputNotFoundError if there is no cache, CacheIncompleteError
    if shards are missing, and DamagedCacheError if an index cannot be read or an object of a shard is missing or has
    another size.
    """
    found, manifest = read_seal(files), read_manifest(files)
    if found is not None:
        files.sync_names([seal_name(len(manifest.extensions))])  # its writer may have been killed before doing so
        return found
    missing = missing_shards(files, manifest)
    if missing:
        raise CacheIncompleteError(
            f"{files.root}: {len(missing)} of {len(manifest.shards)} shards are missing (the first is {missing[0]}, of "
            f"{_data_names(manifest, missing[0])}); run cache-teacher again with that data: it computes only the "
            "missing shards"
        )
    if committed is None or list(committed.digests) != [index_name(shard) for shard in manifest.shards]:
        committed = read_indexes(files, manifest, manifest.shards, check_sizes=True)
    read_tokenizer(files, manifest)
    if manifest.basis is not None:
        read_basis(files, manifest.basis)
    _create_table(files, manifest, committed.table)
    body = _summary(files, manifest, committed)
    envelope = seal_envelope(body.model_dump(mode="json", exclude_none=True))
    text = json.dumps(envelope, indent=2, sort_keys=True, ensure_ascii=False)
    extension = len(manifest.extensions)
    files.sync_names(body.objects)
    files.create(seal_name(extension), text.encode() + b"\n")
    if read_seal(files, extension) != body:
        raise CacheConflictError(
            f"{files.where(seal_name(extension))}: another run sealed the cache at the same time with other content; "
            "run `emkd inspect URI --verify`"
        )
    return body


def read_seal(files: Files, extension: int | None = None) -> Seal | None:
    """Read the newest seal of a cache, or that of `extension`. Returns None if there is none.

    Raises DamagedCacheError if the seal does not match its own hash, and CacheVersionError if its fields and the
    manifest are of a newer format.
    """
    name = seal_name(count_extensions(files) if extension is None else extension)
    data = files.read(name)
    if data is None:
        return None
    where = files.where(name)
    body = open_envelope(where, data)
    try:
        return Seal.model_validate(body)
    except ValidationError as error:
        Manifest.from_bytes(files.read(MANIFEST_NAME) or b"", files.where(MANIFEST_NAME))
        raise DamagedCacheError(f"{where}: not the seal of a cache: {error}. {NEXT_STEP}") from error


def _create_table(files: Files, manifest: Manifest, table: pa.Table) -> None:
    """Write the consolidated index. An existing one is kept; raises DamagedCacheError if it has other rows."""
    name = table_name(len(manifest.extensions))
    data = write_parquet(table)
    if files.create(name, data):
        return
    where, existing = files.where(name), files.read(name) or b""
    if existing != data and not read_parquet(where, existing).equals(table):
        raise DamagedCacheError(
            f"{where}: left by an earlier run, and its rows are not those of the committed shards. Run the same "
            "cache-teacher command again with --repair, which writes it again from index/*.parquet"
        )


def _summary(files: Files, manifest: Manifest, committed: Committed) -> Seal:
    """Return the seal's body: the hashes of the indexes as they were read and checked, and of the other files."""
    table = committed.table
    n_samples = pc.sum(pc.equal(table["status"], OK)).as_py() or 0
    names = (*manifest_files(manifest), *basis_files(manifest), TOKENIZER_NAME, table_name(len(manifest.extensions)))
    digests = {name: ObjectDigest.of(read_existing(files, name)) for name in names} | committed.digests
    return Seal(
        n_samples=n_samples,
        n_skipped=len(table) - n_samples,
        n_shards=len(committed.digests),
        totals=committed.totals,
        objects={name: SealedObject.of(digest) for name, digest in sorted(digests.items())},
    )


def _data_names(manifest: Manifest, shard: int) -> str:
    """Return the names of the data files of a shard's dataset."""
    return ", ".join(file.name for file in manifest.datasets[manifest.source(shard)].files)

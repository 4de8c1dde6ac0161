"""Caches from a stranger: whatever is changed in them, every hash fits."""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emkd.storage.index.commit import _rows_sha256
from emkd.storage.index.table import write_parquet
from emkd.storage.manifest.manifest import UNCOMPARED
from emkd.storage.objects.digest import ObjectDigest, canonical_json, seal_envelope, sha256_hex

KEY = b"emkd"


def same(value: Any) -> Any:
    return value


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a stranger changes, each a function from the old to the new: JSON values, tables; `files` changes the folder
    of a shard in place."""

    manifest: Any = same
    table: Any = same
    body: Any = same
    seal: Any = same
    files: Any = same
    write_index: Any = write_parquet  # (table, metadata) -> bytes


def forge(path, changes: Changes) -> None:
    """Change a sealed cache in place, and make all of its hashes fit again, as emkd would have written them."""
    manifest = changes.manifest(json.loads((path / "manifest.json").read_bytes()))
    (path / "manifest.json").write_text(json.dumps(manifest))
    settings = _settings_sha256(manifest)
    tables = []
    for file in sorted((path / "index").glob("*.parquet")):
        tables.append(_forge_shard(path, file, settings, changes))
    (path / "index.parquet").write_bytes(changes.write_index(pa.concat_tables(tables), None))
    seal = json.loads((path / "seal.json").read_bytes())["body"]
    for name in seal["objects"]:
        digest = ObjectDigest.of((path / name).read_bytes())
        seal["objects"][name] = {"n_bytes": digest.n_bytes, "sha256": digest.sha256}
    (path / "seal.json").write_text(json.dumps(_envelope(changes.seal(seal))))


def _settings_sha256(manifest: Any) -> str:
    compared = {name: value for name, value in manifest.items() if name != UNCOMPARED}
    try:
        return sha256_hex(canonical_json(_without_none(compared)))
    except ValueError:  # of a text or a number that has no JSON
        return ""


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _forge_shard(path, file, settings: str, changes: Changes) -> pa.Table:
    found = pq.read_table(file)
    body = json.loads(found.schema.metadata[KEY])["body"]
    folder = path / "shards" / f"{body['shard']:06d}-{body['attempt']}"
    changes.files(folder)
    old = body["objects"]
    for name in old:
        digest = ObjectDigest.of_array((folder / name).read_bytes()).to_json()
        old[name] = {key: digest[key] for key in old[name]}
    body["settings_sha256"] = settings or body["settings_sha256"]
    table = changes.table(found.replace_schema_metadata(None))
    body["rows_sha256"] = _rows_sha256(table)
    metadata = {KEY: canonical_json(_envelope(changes.body(body)))}
    file.write_bytes(changes.write_index(table, metadata))
    return table


def _envelope(body: Any) -> Any:
    try:
        return seal_envelope(body)
    except ValueError:
        return {"body": body, "sha256": ""}


def in_zarr_json(name: str, change: Any) -> Any:
    """A change of the zarr.json of one array. change: from the parsed file to the new one"""

    def files(folder):
        file = folder / name / "zarr.json"
        file.write_text(json.dumps(change(json.loads(file.read_bytes()))))

    return Changes(files=files)

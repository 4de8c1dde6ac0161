"""The basis of codes as an object of the cache, and records that have codes."""

from dataclasses import replace

import numpy as np
import pytest

from emkd.errors import CacheConflictError, DamagedCacheError, OutputExistsError
from emkd.storage.basis import Basis, identify, read_basis
from emkd.storage.cache import Cache, create_cache, verify
from emkd.storage.index.commit import LogitError, commit_shard, read_index
from emkd.storage.lifecycle.create import delete_unread_bases
from emkd.storage.lifecycle.repair import withdraw
from emkd.storage.lifecycle.seal import seal
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.read import read_manifest
from emkd.storage.objects.local import LocalFiles
from emkd.storage.objects.names import MANIFEST_NAME, basis_name
from emkd.storage.shards.writer import write_shard
from tests.storage.builders import (
    BASIS,
    TOKENIZER_JSON,
    array_fields,
    coded_manifest,
    make_basis,
    make_cache,
    make_manifest,
    make_rows,
)

DATA = BASIS.to_bytes()
NAME = basis_name(BASIS.identity(DATA).sha256)
FORMS = [("stored", 4, 3), ("codes", 4, 3), ("stored", 40, 3), ("stored", 4, 40), ("codes", 40, 40)]


def test_a_basis_comes_back():
    found = Basis.from_bytes("here", DATA, BASIS.identity(DATA))
    assert (found.groups, found.step, found.logit_error) == (BASIS.groups, BASIS.step, BASIS.logit_error)
    for name in ("mean", "projection", "reconstruction", "head", "offset"):
        np.testing.assert_array_equal(getattr(found, name), getattr(BASIS, name))
    assert found.to_bytes() == DATA
    assert identify(DATA) == BASIS.identity(DATA)
    assert identify(DATA[:-1]) is None


def test_hidden_states_and_affinities_against_float64():
    rng = np.random.default_rng(0)
    text, vision = (rng.integers(-9, 9, (n, 5)).astype(np.int16) for n in (3, 4))
    states = [
        BASIS.mean.astype(np.float64) + BASIS.step * codes @ BASIS.reconstruction.T.astype(np.float64)
        for codes in (text, vision)
    ]
    np.testing.assert_allclose(BASIS.hidden(text), states[0], rtol=1e-5, atol=1e-5)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in states]
    np.testing.assert_allclose(BASIS.affinity(text, vision), unit[0] @ unit[1].T, rtol=1e-5, atol=1e-5)


def test_a_softcap_is_in_the_file_and_in_the_manifest_and_only_then(tmp_path):
    capped = replace(BASIS, cap=30.0)
    data = capped.to_bytes()
    assert b"cap" in data
    assert b"cap" not in DATA
    found = Basis.from_bytes("here", data, capped.identity(data))
    assert (found.cap, found.to_bytes()) == (30.0, data)
    assert Basis.from_bytes("here", DATA, BASIS.identity(DATA)).cap is None
    with pytest.raises(DamagedCacheError, match="not the basis that the manifest describes"):
        Basis.from_bytes("here", data, capped.identity(data).model_copy(update={"cap": None}))
    plain, manifest = coded_manifest(), coded_manifest(basis=capped)
    assert b'"cap"' not in plain.to_bytes()
    assert b'"cap": 30.0' in manifest.to_bytes()
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert Manifest.from_bytes(plain.to_bytes()) == plain
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON, data)
    assert read_basis(files, read_manifest(files).basis).cap == 30.0


@pytest.mark.parametrize("other", [b"x", DATA[:-1], DATA + b"x", make_basis(seed=1).to_bytes()])
def test_another_object_is_not_the_basis(other):
    with pytest.raises(DamagedCacheError, match="not the basis of the manifest.*restore the file from a copy"):
        Basis.from_bytes("here", other, BASIS.identity(DATA))


@pytest.mark.parametrize(("affinity", "top_k", "answer_top_k"), FORMS)
def test_records_with_codes_come_back(tmp_path, affinity, top_k, answer_top_k):
    """Codes are stored for what is cut, and for affinities that are not stored."""
    manifest = coded_manifest(affinity=affinity, top_k=top_k, answer_top_k=answer_top_k)
    make_cache(tmp_path, manifest)
    cache, expected = (
        Cache.open(tmp_path),
        [row for shard in range(3) for row in make_rows(manifest, shard) if row.record],
    )
    assert len(cache) == len(expected) == 4
    for number, row in enumerate(expected):
        found = cache.record(number)
        fields, originals = array_fields(found), array_fields(row.record)
        assert fields.keys() == originals.keys()
        assert ("vision_codes" in fields) == (top_k < 40 or affinity == "codes")
        assert ("answer_codes" in fields) == (answer_top_k < 40)
        assert ("text_codes" in fields) == (affinity == "codes") == (found.affinity is None)
        for name in ("vision_codes", "answer_codes", "text_codes"):
            if name in fields:
                assert fields[name].dtype in (np.int8, np.int16)
                np.testing.assert_array_equal(fields[name], originals[name])
        if affinity == "codes":
            expected_affinity = BASIS.affinity(row.record.text_codes, row.record.vision.codes)
            np.testing.assert_array_equal(cache.affinity(found), expected_affinity)
        else:
            np.testing.assert_array_equal(cache.affinity(found), found.affinity)


def test_an_image_that_samples_share_has_one_frame(tmp_path):
    manifest = coded_manifest(n_rows=4, rows_per_shard=4)
    make_cache(tmp_path, manifest, contents=[5, 5, 6, 5])
    cache = Cache.open(tmp_path)
    shard = cache.read_shard(0)
    assert shard.arrays["vision_frame_tokens"].chunks.size == 4  # two images of 5, two of 6
    first, last = cache.record(0), cache.record(3)
    np.testing.assert_array_equal(first.vision.codes, last.vision.codes)
    assert len(first.vision.codes) == len(first.vision)


def test_codes_in_memory_are_as_small_as_on_disk(tmp_path):
    """A loader's window holds frames; a record's codes are decoded when it is asked for."""
    manifest = coded_manifest(affinity="codes")
    make_cache(tmp_path, manifest)
    shard = Cache.open(tmp_path).read_shard(0)
    on_disk = sum(f.stat().st_size for f in tmp_path.glob("shards/000000-*/*_codes/c/*"))
    in_memory = sum(array.chunks.nbytes for name, array in shard.arrays.items() if name.endswith("_codes"))
    assert 0 < in_memory <= on_disk


def test_the_measured_error_is_in_index_and_seal(tmp_path):
    manifest = coded_manifest(n_rows=4, rows_per_shard=2)
    files = create_cache(tmp_path, manifest, TOKENIZER_JSON, DATA)
    errors = {0: (0.25, 0.75), 1: (0.5,), 2: (1.5,), 3: ()}
    for shard in (0, 1):
        rows = [replace(row, squared_error=errors[row.hint.row]) for row in make_rows(manifest, shard, skip=())]
        commit_shard(files, write_shard(files, shard, "a", rows, manifest))
    assert read_index(files, 0).logit_error == LogitError(mean_square=0.5, n_tokens=3)
    assert read_index(files, 1).logit_error == LogitError(mean_square=1.5, n_tokens=1)
    assert seal(files).totals.logit_error == pytest.approx(((3 * 0.5 + 1.5) / 4) ** 0.5, rel=1e-5)


def test_a_cache_without_codes_has_no_basis(tmp_path):
    files = make_cache(tmp_path)
    assert Cache.open(tmp_path).basis is None
    assert read_index(files, 0).logit_error is None
    assert not list(tmp_path.glob("basis-*"))


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("damage", ["flipped", "missing", "cut"])
def test_a_damaged_basis_is_found_named_and_not_replaced(tmp_path, damage, sealed):
    files = make_cache(tmp_path, coded_manifest(), sealed=sealed)
    path = tmp_path / NAME
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(DATA[:-1] if damage == "cut" else DATA[:200] + bytes([DATA[200] ^ 1]) + DATA[201:])
    found = verify(tmp_path)
    assert [one.name for one in found] == [NAME]
    with pytest.raises(DamagedCacheError, match=NAME):
        read_basis(files, coded_manifest().basis)
    with pytest.raises(DamagedCacheError, match=f"{NAME}.*(restore the file from a copy|may be intact)"):
        withdraw(files, found, coded_manifest(), TOKENIZER_JSON)
    assert len(list(tmp_path.glob("index/*"))) == 3  # nothing was changed


def test_a_damaged_manifest_is_written_again_with_the_basis_of_the_folder(tmp_path):
    files = make_cache(tmp_path, coded_manifest())
    before = (tmp_path / MANIFEST_NAME).read_bytes()
    (tmp_path / MANIFEST_NAME).write_bytes(b"{}")
    other = make_basis(seed=1).to_bytes()
    (tmp_path / basis_name(identify(other).sha256)).write_bytes(other)  # of a job that lost the race
    assert withdraw(files, verify(tmp_path), coded_manifest().with_basis(None), TOKENIZER_JSON) == []
    assert (tmp_path / MANIFEST_NAME).read_bytes() == before
    seal(files)
    assert verify(tmp_path) == []


def test_a_damaged_manifest_without_any_basis_is_refused(tmp_path):
    make_cache(tmp_path, coded_manifest(), sealed=False)
    (tmp_path / MANIFEST_NAME).write_bytes(b"{}")
    (tmp_path / NAME).unlink()
    with pytest.raises(DamagedCacheError, match="is damaged, and the basis of its codes is missing"):
        withdraw(
            LocalFiles(tmp_path),
            verify(tmp_path),
            coded_manifest().with_basis(None),
            TOKENIZER_JSON,
            [make_manifest().in_format(3)],
        )


def test_bases_that_nothing_reads_can_be_deleted(tmp_path):
    files = make_cache(tmp_path, coded_manifest())
    other = make_basis(seed=1).to_bytes()
    stray = basis_name(identify(other).sha256)
    (tmp_path / stray).write_bytes(other)
    assert delete_unread_bases(files) == [stray]
    assert [path.name for path in tmp_path.glob("basis-*")] == [NAME]
    assert verify(tmp_path) == []


def test_a_folder_with_nothing_but_a_basis_is_not_a_cache_yet(tmp_path):
    """A job was killed between its basis and its manifest."""
    (tmp_path / NAME).write_bytes(DATA)
    create_cache(tmp_path, coded_manifest(), TOKENIZER_JSON, DATA)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / NAME).write_bytes(DATA)
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(OutputExistsError, match=r"notes\.txt"):
        create_cache(tmp_path / "other", coded_manifest(), TOKENIZER_JSON, DATA)


def test_of_two_jobs_that_start_at_once_the_first_basis_counts(tmp_path):
    create_cache(tmp_path, coded_manifest(), TOKENIZER_JSON, DATA)
    late = make_basis(seed=1)
    files = create_cache(tmp_path, coded_manifest(basis=late), TOKENIZER_JSON, late.to_bytes())
    assert [name for name in files.names() if name.startswith("basis")] == [NAME]
    asked = coded_manifest().codes.model_copy(update={"logit_error": 0.25})
    other = coded_manifest().model_copy(update={"codes": asked})
    with pytest.raises(CacheConflictError, match=r"codes\.logit_error: cache has 0\.5, this run 0\.25"):
        create_cache(tmp_path, other, TOKENIZER_JSON)


def test_a_manifest_without_its_basis_is_not_written():
    with pytest.raises(ValueError, match="with their basis"):
        coded_manifest().with_basis(None).to_bytes()


@pytest.mark.parametrize("change", [{"affinity": "codes"}, {"basis": BASIS.identity(DATA)}])
def test_a_basis_or_affinities_from_codes_need_codes(change):
    with pytest.raises(ValueError, match="without codes"):
        Manifest.model_validate({**make_manifest().model_dump(), **change})


def test_older_formats_have_no_codes():
    older = coded_manifest(affinity="codes").in_format(3)
    assert (older.codes, older.basis, older.affinity) == (None, None, None)
    assert b"codes" not in older.to_bytes()
    with pytest.raises(ValueError, match="format version 3, which does not have it"):
        Manifest.model_validate({**coded_manifest().model_dump(), "format_version": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": None}, "vision.codes is missing"),
        ({"codes": np.zeros((9, 4), np.int16)}, r"vision.codes has shape \(9, 4\), expected \(9, 5\)"),
        ({"codes": np.zeros((9, 5), np.int32)}, "vision.codes is int32, expected int16 or int8"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(tmp_path, change, message):
    manifest = coded_manifest()
    rows = make_rows(manifest, 2)
    record = rows[0].record
    assert len(record.vision) == 8
    change = {k: v if v is None else v[:8] for k, v in change.items()}
    wrong = replace(rows[0], record=replace(record, vision=replace(record.vision, **change)))
    with pytest.raises(ValueError, match=message.replace("9,", "8,")):
        write_shard(create_cache(tmp_path, manifest, TOKENIZER_JSON, DATA), 2, "a", [wrong], manifest)

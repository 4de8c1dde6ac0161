"""The damage of a cache is described, with and without reading the arrays."""

import json
import shutil

import pytest

from emkd.cli import main
from emkd.errors import CacheVersionError, DamagedCacheError, InputNotFoundError
from emkd.inspection import inspect_cache
from emkd.storage.cache import Cache
from emkd.storage.manifest.manifest import FORMAT_VERSION
from tests.inspection.made import write_cache
from tests.storage.builders import make_cache, make_manifest, make_rows

# Without the first one a cache is not sealed, and whole.
DESCRIBING = ("seal.json", "manifest.json", "tokenizer.json", "index.parquet")


@pytest.fixture
def cache(tmp_path):
    """Three shards of rows 0 to 4; row 3 was skipped."""
    make_cache(tmp_path / "cache")
    return tmp_path / "cache"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def chunk(cache, shard):
    return next(cache.glob(f"shards/{shard:06d}-*/vision_logits/c/0/0"))


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


@pytest.mark.parametrize(
    ("name", "gone"), [(name, False) for name in DESCRIBING] + [(name, True) for name in DESCRIBING[1:]]
)
def test_what_describes_a_cache_is_named(cache, name, gone, capsys):
    if gone:
        (cache / name).unlink()
    else:
        flip(cache / name)
    report = inspect_cache(cache)
    assert set(report) == {"uri", "sealed", "damaged", "verified"}
    assert [entry["name"] for entry in report["damaged"]] == [name]
    assert report["sealed"] is (None if name == "seal.json" else True)
    assert report["verified"] is False
    what = report["damaged"][0]["what"]
    assert ("missing" in what) == gone
    assert str(cache) not in what  # the name is beside it
    assert "None of its data was used" not in what  # nor is the next step said for each object
    code, out, err = call(capsys, cache)
    assert (code, err) == (1, "")
    assert f"{cache}: 1 damaged object " in out
    assert f"  {name}: {what}" in out
    assert f"`emkd inspect {cache} --verify` reads everything" in out
    assert "--repair" in out
    code, out, _ = call(capsys, cache, "--json")
    assert (code, json.loads(out)) == (1, report)


def test_all_of_it_is_listed(cache, capsys):
    """Once something is damaged, objects that opening does not read are checked too; arrays only with --verify."""
    for path in (cache / "index.parquet", cache / "index" / "000001.parquet", chunk(cache, 0), chunk(cache, 2)):
        flip(path)
    names = [entry["name"] for entry in inspect_cache(cache)["damaged"]]
    assert names == ["index.parquet", "index/000001.parquet"]
    report = inspect_cache(cache, verify_bytes=True)
    arrays = [str(chunk(cache, shard).relative_to(cache)) for shard in (0, 2)]
    assert [entry["name"] for entry in report["damaged"]] == [*names, *arrays]
    assert (report["sealed"], report["verified"]) == (True, True)
    code, out, _ = call(capsys, cache, "--verify")
    assert code == 1
    assert "4 damaged objects (sealed)" in out
    assert all(f"  {name}: " in out for name in (*names, *arrays))
    assert "--verify`" not in out
    assert "--repair" in out


def test_damaged_arrays_are_no_matter_of_the_summary(cache):
    flip(chunk(cache, 0))
    assert inspect_cache(cache)["samples"] == 4
    report = inspect_cache(cache, verify_bytes=True)
    assert [entry["name"] for entry in report["damaged"]] == [str(chunk(cache, 0).relative_to(cache))]


def test_an_unsealed_cache_with_a_damaged_index(cache, capsys):
    (cache / "seal.json").unlink()
    (cache / "index" / "000002.parquet").unlink()
    flip(cache / "index" / "000000.parquet")
    report = inspect_cache(cache)
    assert report["sealed"] is False
    assert [entry["name"] for entry in report["damaged"]] == ["index/000000.parquet"]
    assert "(not sealed)" in call(capsys, cache)[1]


def test_a_verified_cache_says_so(cache, capsys):
    report = inspect_cache(cache, verify_bytes=True)
    assert (report["damaged"], report["verified"], report["samples"]) == ([], True, 4)
    assert "every byte verified" in call(capsys, cache, "--verify")[1]
    report = inspect_cache(cache)
    assert (report["verified"], "damaged" in report) == (False, False)
    assert "every byte" not in call(capsys, cache)[1]


def test_nothing_of_a_damaged_shard_is_shown(tmp_path, capsys):
    """A sample of a damaged shard raises an error that names the object; samples of other shards are shown."""
    cache = tmp_path / "cache"
    manifest = make_manifest()
    write_cache(cache, manifest, [make_rows(manifest, shard) for shard in range(3)])
    keys = Cache.open(cache).sample_keys
    flip(chunk(cache, 0))
    with pytest.raises(DamagedCacheError, match="shards/000000-.*vision_logits/c/0/0: content changed"):
        inspect_cache(cache, sample=keys[0])
    code, out, err = call(capsys, cache, "--sample", keys[0])
    assert (code, out) == (1, "")
    assert "vision_logits/c/0/0" in err
    assert inspect_cache(cache, sample=keys[2])["key"] == keys[2]
    flip(cache / "index.parquet")
    with pytest.raises(DamagedCacheError, match="index.parquet: content changed"):
        inspect_cache(cache, sample=keys[2])


def test_another_version_and_no_cache_stay_errors(cache, tmp_path):
    with pytest.raises(InputNotFoundError, match="no cache at"):
        inspect_cache(tmp_path / "nowhere")
    shutil.rmtree(cache)
    make_cache(cache, make_manifest(format_version=FORMAT_VERSION + 1), sealed=False, shards=())
    flip(cache / "tokenizer.json")
    with pytest.raises(CacheVersionError, match="format version 5"):
        inspect_cache(cache)
    with pytest.raises(CacheVersionError, match="format version 5"):
        inspect_cache(cache, verify_bytes=True)


def test_damage_that_is_mended_while_it_is_looked_for(cache, monkeypatch):
    """As a running --repair does: opening fails, a moment later nothing is damaged."""
    whole = (cache / "index.parquet").read_bytes()
    flip(cache / "index.parquet")

    def mended(uri, **options):
        (cache / "index.parquet").write_bytes(whole)
        return verify(uri, **options)

    from emkd.inspection.damage import verify

    monkeypatch.setattr("emkd.inspection.damage.verify", mended)
    assert inspect_cache(cache)["samples"] == 4

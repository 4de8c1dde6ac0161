"""The manifest of a cache."""

import json

import pytest
from pydantic import ValidationError

from emkd.errors import CacheVersionError, DamagedCacheError
from emkd.storage.manifest.conflicts import conflicts, setting_conflicts
from emkd.storage.manifest.manifest import FORMAT_VERSION, Manifest
from emkd.storage.manifest.plan import ShardPlan
from tests.storage.builders import make_manifest


def test_round_trip_is_indented_sorted_json():
    manifest = make_manifest()
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data) == manifest
    value = json.loads(data)
    assert data.decode() == json.dumps(value, indent=2, sort_keys=True) + "\n"
    assert value["format_version"] == FORMAT_VERSION == 4
    assert value["image_processor"]["settings"]["size"] == [336, 336]


def test_a_newer_format_is_refused_even_with_unknown_fields():
    value = json.loads(make_manifest().to_bytes()) | {"format_version": 7, "future": {}}
    with pytest.raises(CacheVersionError, match="format version 7; this emkd reads versions up to 4"):
        Manifest.from_bytes(json.dumps(value).encode())


@pytest.mark.parametrize("data", [b"", b"\xff{", b"[]", b"{}", b'{"format_version": 1}'])
def test_other_json_is_no_manifest(data):
    with pytest.raises(DamagedCacheError, match=r"manifest\.json: not "):
        Manifest.from_bytes(data)


def test_nothing_unknown_is_accepted_and_nothing_changes_later():
    value = json.loads(make_manifest().to_bytes())
    with pytest.raises(DamagedCacheError, match="surprise"):
        Manifest.from_bytes(json.dumps(value | {"surprise": 1}).encode())
    with pytest.raises(ValidationError, match="frozen"):
        make_manifest().top_k = 3


def test_conflicts_name_the_fields():
    cache = make_manifest()
    run = cache.model_copy(
        update={
            "teacher": cache.teacher.model_copy(update={"name": "other", "revision": "main"}),
            "top_k": 8,
            "image_processor": cache.image_processor.model_copy(update={"settings": {"size": [336, 448]}}),
        }
    )
    assert conflicts(cache, run) == [
        "image_processor.settings.mean: cache has 2 entries, this run nothing",
        "image_processor.settings.size[1]: cache has 336, this run 448",
        "teacher.name: cache has 'tiny-teacher', this run 'other'",
        "teacher.revision: cache has None, this run 'main'",
        "top_k: cache has 4, this run 8",
    ]


def test_created_by_is_not_compared():
    other = make_manifest(created_by={"emkd": "9.9"})
    assert conflicts(make_manifest(), other) == []
    assert other.settings_sha256 == make_manifest().settings_sha256
    assert other.settings_sha256 != make_manifest(top_k=5).settings_sha256


def with_template(manifest: Manifest, template: str | None, sha256: str = "01" * 32) -> Manifest:
    changes = {"chat_template": template, "chat_template_sha256": sha256}
    return manifest.model_copy(update={"tokenizer": manifest.tokenizer.model_copy(update=changes)})


def test_a_cache_from_before_the_template_was_kept_reads_and_goes_on_as_it_was():
    now = with_template(make_manifest(), "{{ messages }}")
    assert Manifest.from_bytes(now.to_bytes()).tokenizer.chat_template == "{{ messages }}"
    value = json.loads(make_manifest().to_bytes())
    del value["tokenizer"]["chat_template"]  # as older versions wrote it
    before = Manifest.from_bytes(json.dumps(value).encode())
    assert before.settings_sha256 == make_manifest().settings_sha256 == now.without("chat_template").settings_sha256
    assert now.settings_sha256 != before.settings_sha256, "the template is vouched for where it is kept"
    assert conflicts(before, now) == setting_conflicts(before, now) == []
    for found in (conflicts, setting_conflicts):
        assert found(before, with_template(now, "other", "02" * 32)) == [
            f"tokenizer.chat_template_sha256: cache has '{'01' * 32}', this run '{'02' * 32}'"
        ]


@pytest.mark.parametrize(("n_rows", "rows_per_shard"), [(0, 4), (1, 4), (4, 4), (5, 4), (9, 1)])
def test_the_plan_covers_each_row_once(n_rows, rows_per_shard):
    plan = ShardPlan.of(n_rows=n_rows, rows_per_shard=rows_per_shard)
    rows = [row for shard in range(plan.n_shards) for row in plan.rows(shard)]
    assert rows == list(range(n_rows))
    with pytest.raises(ValueError, match="the plan has shards 0 to"):
        plan.rows(plan.n_shards)


def test_inconsistent_numbers_are_refused():
    with pytest.raises(ValidationError, match="n_shards is 3, expected 2"):
        ShardPlan(rows_per_shard=4, n_rows=8, n_shards=3)
    with pytest.raises(ValidationError, match="top_k is 41, but V is 40"):
        make_manifest(top_k=41)
    value = json.loads(make_manifest().to_bytes())
    value["plan"] = {"n_rows": 6, "n_shards": 3, "rows_per_shard": 2}
    with pytest.raises(ValidationError, match=r"plan\.n_rows is 6, the dataset has 5"):
        Manifest.model_validate(value)

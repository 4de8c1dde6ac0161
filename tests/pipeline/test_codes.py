"""Codes through the whole of the job without Ray: the basis, what is asked for, records, errors, extensions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from emkd.errors import CacheConflictError, JobFailedError, ModelError, UsageError
from emkd.pipeline.cache_size import Sizes
from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.preflight import Estimate, _check_error
from emkd.pipeline.progress import too_large_error
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker, Preflight, ShardReport
from emkd.samples import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.cache import Cache, verify
from emkd.storage.index.commit import LogitError, read_index
from emkd.storage.lifecycle.create import refuse
from emkd.storage.manifest.conflicts import conflicts
from emkd.storage.objects.open import open_files
from emkd.vlm import load
from emkd.vlm.forward import collate, last_hidden_state
from emkd.vlm.states import States
from tests import tiny
from tests.storage.builders import make_basis

ERROR = 0.3


def settings(teacher_path, data_path, **chosen) -> JobSettings:
    given = {"cache": "nowhere", "gpus_per_worker": 0, "top_k": 4, "answer_top_k": 5, **chosen}
    return JobSettings(teacher=str(teacher_path), data=str(data_path), **given)


def manifest_of(chosen: JobSettings, version: int = 4):
    return job_manifest(chosen, Dataset(chosen.data), version)[0]


@pytest.fixture(scope="module")
def coded(teacher_path, data_path, tmp_path_factory):
    """A cache with codes of all tokens, of a model of random weights in float32."""
    return tiny.make_cache(
        teacher_path, data_path, tmp_path_factory.mktemp("coded") / "cache",
        top_k=4, answer_top_k=5, logit_error=ERROR, affinity="codes",
    )  # fmt: skip


def live_states(teacher_path, data_path):
    """States of each row, from the model alone."""
    vlm, dataset = load(str(teacher_path)), Dataset(str(data_path))
    encoder = Encoder(vlm.processor, vlm.image_token_id)
    for row in range(dataset.n_rows):
        item = encoder(dataset.sample(row))
        with torch.no_grad():
            hidden = last_hidden_state(vlm.model, collate([item], 0))[0]
        yield vlm, States.of(item, hidden)


def test_codes_are_those_of_the_hidden_states(coded, teacher_path, data_path):
    """In float64, and every logit within what the step allows of the model's own."""
    cache = Cache.open(coded)
    basis = cache.basis
    squares = []
    for number, (vlm, states) in enumerate(live_states(teacher_path, data_path)):
        record = cache.record(number)
        head = vlm.model.lm_head.weight[: vlm.n_tokens].detach().double()
        for codes, hidden in (
            (record.vision.codes, states.vision), (record.answer.codes, states.predicting), (record.text_codes, states.text),
        ):  # fmt: skip
            h = hidden.double().numpy()
            exact = (h - basis.mean.astype(np.float64)) @ basis.projection.astype(np.float64) / basis.step
            assert codes.shape == exact.shape
            assert np.abs(codes - exact).max(initial=0) <= 0.5 + 1e-2
            read = basis.step * codes @ basis.head.astype(np.float64).T + basis.offset
            squares.append(((read - hidden.double().numpy() @ head.numpy().T) ** 2).mean(axis=1))
    measured = np.sqrt(np.concatenate(squares).mean())
    assert 0.5 * ERROR < measured <= 1.1 * ERROR
    seal = cache.totals.logit_error
    assert seal == pytest.approx(measured, rel=0.35)  # of a few tokens
    assert cache.manifest.basis.logit_error == ERROR


def test_affinities_from_codes_are_near_the_models_own(coded, teacher_path, data_path):
    cache = Cache.open(coded)
    for number, (_, states) in enumerate(live_states(teacher_path, data_path)):
        record = cache.record(number)
        expected = torch.nn.functional.cosine_similarity(states.text[:, None], states.vision[None], dim=2)
        assert record.affinity is None
        difference = np.abs(cache.affinity(record) - expected.numpy())
        assert difference.max(initial=0) < 0.25
        assert difference.sum() <= 0.06 * difference.size


def test_each_shard_has_its_measured_error(coded):
    files = open_files(coded)
    errors = [read_index(files, shard).logit_error for shard in (0, 1)]
    assert [error.n_tokens for error in errors] == [3 * 4 + 1, 2 * 4]  # 3 vision tokens and an answer; a text-only row
    assert all(0 < error.root < 1.2 * ERROR for error in errors)
    assert verify(coded) == []


def test_the_same_job_gives_the_same_bytes(coded, teacher_path, data_path, tmp_path):
    again = tiny.make_cache(
        teacher_path, data_path, tmp_path / "again", top_k=4, answer_top_k=5, logit_error=ERROR, affinity="codes"
    )
    names = sorted(
        f.relative_to(coded)
        for f in coded.rglob("*")
        if f.is_file() and "shards" not in f.parts and "index" not in f.parts
    )
    assert names == sorted(
        f.relative_to(again)
        for f in again.rglob("*")
        if f.is_file() and "shards" not in f.parts and "index" not in f.parts
    )
    assert [f.read_bytes() for f in sorted(coded.glob("basis-*"))] == [
        f.read_bytes() for f in sorted(again.glob("basis-*"))
    ]
    one, other = (read_index(open_files(folder), 0).objects for folder in (coded, again))
    assert one == other


def test_an_extension_has_the_basis_of_its_cache(teacher_path, data_path, tmp_path):
    chosen = {"top_k": 4, "answer_top_k": 5, "logit_error": ERROR, "rows_per_shard": 2}
    cache = tiny.make_cache(teacher_path, data_path, tmp_path / "cache", limit=3, **chosen)
    before = Cache.open(cache).manifest.basis
    tiny.make_cache(teacher_path, data_path, cache, extend=True, **chosen)
    after = Cache.open(cache)
    assert after.manifest.basis == before
    assert len(after) == 6
    assert len(list(cache.glob("basis-*"))) == 1
    assert after.record(5).vision.codes.shape == (16, before.n_columns)


@pytest.mark.parametrize(
    ("chosen", "codes", "top_k"),
    [
        ({}, (0.8, 160), 8),
        ({"logit_error": 0.4}, (0.4, None), 8),
        ({"token_bytes": 90}, (None, 90), 8),
        ({"logit_error": 0.4, "token_bytes": 90}, (0.4, 90), 8),
        ({"logit_error": "none"}, None, 26),
        ({"top_k": 12}, (0.8, None), 12),
        ({"top_k": 0}, (0.8, None), 26),
        ({"top_k": 0, "answer_top_k": 0}, None, 26),
        ({"top_k": 0, "answer_top_k": 0, "affinity": "codes"}, (0.8, None), 26),
    ],
)
def test_what_is_asked_for_is_in_the_manifest(teacher_path, data_path, chosen, codes, top_k):
    """V is 26, and 64 logits are all of them."""
    manifest = manifest_of(settings(teacher_path, data_path, **{"top_k": None, **chosen}))
    asked = None if manifest.codes is None else (manifest.codes.logit_error, manifest.codes.token_bytes)
    assert (asked, manifest.top_k, manifest.basis) == (codes, top_k, None)
    assert manifest.affinity == chosen.get("affinity", "stored")


def test_a_cache_of_an_older_format_keeps_its_defaults(teacher_path, data_path):
    """The command that made it, run again, asks for the same: 64 logits and no codes."""
    manifest = manifest_of(settings(teacher_path, data_path, top_k=None), 3)
    assert (manifest.format_version, manifest.codes, manifest.affinity, manifest.top_k) == (3, None, None, 26)
    older = manifest_of(settings(teacher_path, data_path, top_k=None, logit_error="none")).in_format(3)
    assert conflicts(older, manifest) == []
    for asks in ({"logit_error": 0.4}, {"token_bytes": 90}, {"affinity": "codes"}):
        with pytest.raises(UsageError, match="format version 3, which has no codes"):
            manifest_of(settings(teacher_path, data_path, **asks), 3)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"logit_error": 0.0}, "--logit-error 0.0: expected a number above 0"),
        ({"logit_error": float("nan")}, "--logit-error nan"),
        ({"logit_error": "all"}, "--logit-error 'all': expected one of none"),
        ({"token_bytes": 0}, "--token-bytes 0: expected at least 1"),
        ({"affinity": "both"}, "--affinity 'both': expected one of stored, codes"),
        ({"affinity": "codes", "logit_error": "none"}, "--affinity codes needs codes"),
        ({"token_bytes": 50, "logit_error": "none"}, "--token-bytes needs codes"),
        ({"head_memory": 0}, "--head-memory 0"),
    ],
)
def test_wrong_settings_are_named(teacher_path, data_path, chosen, message):
    with pytest.raises(UsageError, match=message):
        settings(teacher_path, data_path, **chosen)


def test_codes_that_would_add_nothing_are_refused(teacher_path, data_path):
    with pytest.raises(UsageError, match="codes would add nothing"):
        manifest_of(settings(teacher_path, data_path, top_k=0, answer_top_k=0, logit_error=0.5))


@pytest.fixture(scope="module")
def chooser(teacher_path, data_path):
    chosen = settings(teacher_path, data_path)
    return CaptureWorker(chosen, manifest_of(chosen))._chooser(range(6))


def asked(logit_error=None, token_bytes=None):
    from emkd.storage.manifest.codes import CodesAsked

    return CodesAsked(logit_error=logit_error, token_bytes=token_bytes)


def test_a_budget_of_bytes_gives_the_smallest_error_within_it(chooser):
    errors = []
    for budget in (25, 30, 36):
        choice = chooser.choose(asked(token_bytes=budget))
        assert choice.top_bytes + choice.code_bytes <= budget
        errors.append(choice.basis.logit_error)
        assert f"the smallest error within {budget} bytes" in choice.describe()
        finer = chooser.cut(0.9 * choice.basis.logit_error)
        assert choice.top_bytes + chooser.code_bytes(finer) > budget
    assert errors == sorted(errors, reverse=True)


def test_an_error_that_fits_the_budget_is_taken_and_one_that_does_not_is_raised(chooser):
    wide, narrow = chooser.choose(asked(0.5, 10_000)), chooser.choose(asked(0.01, 36))
    assert wide.basis.logit_error == 0.5
    assert "no more than 10000 bytes" in wide.describe()
    assert narrow.basis.logit_error > 0.01
    assert "0.01 would take more than 36 bytes" in narrow.describe()


def test_a_budget_that_the_largest_logits_exceed_is_refused(chooser):
    with pytest.raises(
        UsageError, match=r"10 bytes a vision token are too few: the largest logits and their tails take"
    ):
        chooser.choose(asked(token_bytes=10))


def test_a_head_that_is_not_linear_is_refused(teacher_path, data_path):
    chosen = settings(teacher_path, data_path)
    worker = CaptureWorker(chosen, manifest_of(chosen))
    teacher, _ = worker._loaded()

    class Head(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, hidden):
            return self.inner(hidden)

    teacher.vlm.model.lm_head = Head(teacher.vlm.model.lm_head)
    with pytest.raises(ModelError, match="not a linear layer"):
        worker.choose_basis([0, 1])
    assert "not a linear layer" in worker.study(None, [0, 1], [2])["missing"]


def test_rows_that_cannot_be_used_make_no_basis(teacher_path, tmp_path):
    row = {**tiny.rows()[0], "images": [b"not an image"]}
    chosen = settings(teacher_path, tiny.write_data(tmp_path / "rows.parquet", [row] * 2))
    with pytest.raises(
        JobFailedError, match="none of the 2 rows checked can be used; the first is row 0: image-broken"
    ):
        CaptureWorker(chosen, manifest_of(chosen)).choose_basis([0, 1])


def test_the_preflight_runs_with_the_basis_it_made_and_counts_its_bytes(teacher_path, data_path, tmp_path):
    chosen = settings(teacher_path, data_path, cache=str(tmp_path / "cache"))
    worker = CaptureWorker(chosen, manifest_of(chosen))
    choice = worker.choose_basis([0, 1, 2])
    seen = worker.preflight([0, 1, 2], choice)
    without = CaptureWorker(replace(chosen, logit_error="none"), manifest_of(replace(chosen, logit_error="none")))
    bare = without.preflight([0, 1, 2])
    assert seen.sizes.once - bare.sizes.once > len(choice.basis.to_bytes()) - 500
    assert seen.sizes.per_row > bare.sizes.per_row
    assert not (tmp_path / "cache").exists()


def seen(measured, predicted):
    error = None if measured is None else LogitError(mean_square=measured**2, n_tokens=9)
    return Preflight(
        n_rows=3, sizes=Sizes(per_row=1, per_shard=1, once=1), seconds=1.0, vision_tokens=9, skipped=(), end_token=True,
        logit_error=error, predicted=predicted,
    )  # fmt: skip


def test_the_preflight_compares_the_error_with_the_prediction(capsys):
    _check_error(seen(None, None))
    assert capsys.readouterr().err == ""
    _check_error(seen(0.7, 0.8))
    assert capsys.readouterr().err.startswith("logits read from codes have an error of 0.7 on the rows checked")
    _check_error(seen(0.9, 0.8))
    assert capsys.readouterr().err.startswith("warning: logits")
    with pytest.raises(JobFailedError, match="an error of 30 on the rows checked, predicted 0.8: .*--logit-error none"):
        _check_error(seen(30.0, 0.8))


@pytest.mark.parametrize("chosen", [{"top_k": 0}, {"top_k": 0, "answer_top_k": 0, "affinity": "codes"}, {"top_k": 20}])
def test_whoever_chooses_k_is_not_limited_by_the_default_budget(teacher_path, data_path, chosen):
    chosen = settings(teacher_path, data_path, **chosen)
    choice = CaptureWorker(chosen, manifest_of(chosen)).choose_basis(range(6))
    assert choice.basis.logit_error == 0.8
    with pytest.raises(UsageError, match="--token-bytes 90 limits|would add nothing"):
        manifest_of(replace(chosen, top_k=0, token_bytes=90))


def report(error):
    return ShardReport(
        number=7, committed=True, n_samples=1, n_skipped=0, n_halved=0, n_shared=0, n_different=0, n_bytes=1, seconds=1.0,
        logit_error=None if error is None else LogitError(mean_square=error**2, n_tokens=4),
    )  # fmt: skip


def test_a_shard_that_exceeds_the_prediction_is_named():
    assert too_large_error(report(0.85), 0.8) is None
    assert too_large_error(report(None), 0.8) is None
    assert too_large_error(report(9.0), None) is None
    assert "shard 7: logits read from codes have an error of 0.9, and 0.8 was predicted" in too_large_error(
        report(0.9), 0.8
    )


def test_other_codes_conflict_and_another_basis_does_not(teacher_path, data_path):
    one = manifest_of(settings(teacher_path, data_path, logit_error=0.4))
    other = manifest_of(settings(teacher_path, data_path, logit_error=0.2))
    assert conflicts(one, other) == ["codes.logit_error: cache has 0.4, this run 0.2"]
    assert conflicts(one.with_basis(make_basis().identity(b"")), one) == []
    with pytest.raises(CacheConflictError):
        refuse(open_files("."), conflicts(one, other))


def test_an_estimate_says_which_codes_were_chosen():
    estimate = Estimate(
        n_rows=1, n_shards=1, sizes=Sizes(per_row=1, per_shard=1, once=1), bytes_per_vision_token=1, seconds=1,
        free_bytes=10, codes="codes with an error",
    )  # fmt: skip
    assert estimate.describe().startswith("codes with an error\n1 rows in 1 shards")
    assert estimate.as_dict()["codes"] == "codes with an error"

"""`emkd inspect --against-teacher`: figures against a float64 reference, and differences just below and above the
tolerance."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from emkd.cli import main
from emkd.errors import DataMismatchError, SampleError, SampleNotFoundError, TeacherMismatchError, UsageError
from emkd.inspection.compare.against_teacher import LiveSettings, check_agreement, compare_with_teacher
from emkd.inspection.compare.differences import Differences
from emkd.inspection.compare.live_teacher import load_teacher, pick, read
from emkd.pipeline.capture import Teacher
from emkd.samples.dataset import Dataset
from emkd.storage.cache import Cache, create_cache
from emkd.storage.manifest.read import read_manifest
from emkd.storage.objects.open import open_files
from emkd.storage.record import TopLogits
from emkd.trainer.data.selection import select
from tests import tiny
from tests.storage.builders import changed

pytestmark = pytest.mark.slow

KINDS = {
    "float32": {"dtype": "float32", "precision": "float32", "affinity_precision": "float32"},
    "rounded": {"dtype": "float32", "precision": "bfloat16", "affinity_precision": "int8"},
    "bfloat16": {"dtype": "bfloat16", "precision": "bfloat16", "affinity_precision": "int8"},
    "float16": {"dtype": "float16", "precision": "float16", "affinity_precision": "float16"},
}
K = 8


@pytest.fixture(scope="module")
def caches(teacher_path, data_path, tmp_path_factory):
    """A cache of every kind, its rows in batches of several."""
    folder = tmp_path_factory.mktemp("kinds")
    return {
        kind: tiny.make_cache(teacher_path, data_path, folder / kind, top_k=K, answer_top_k=K, **chosen)
        for kind, chosen in KINDS.items()
    }


@pytest.fixture(scope="module")
def other_path(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("other"), seed=9, hidden=32)


def off_by(teacher_path, folder, share):
    """The teacher with every weight times 1 + share · N(0, 1)."""
    model = tiny.new_model(seed=1, hidden=32, lm_head_rows=64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + share * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tiny.new_processor().save_pretrained(folder)
    return folder


def compare(cache, teacher, data, **chosen):
    return compare_with_teacher(cache, LiveSettings(against_teacher=str(teacher), data=str(data), **chosen), print)


def inspect(capfd, *arguments):
    """(exit code, stdout, stderr)"""
    with pytest.raises(SystemExit) as left:
        main(["inspect", *map(str, arguments)])
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return int(left.value.code or 0), out, err


# What is compared


def reference(cache, teacher_path, data_path):
    """{quantity: absolute differences}, from the whole model's own logits and hidden states, in float64 and by sorting
    and summing over all ids. For a cache in float32."""
    model = AutoModelForImageTextToText.from_pretrained(teacher_path, dtype=torch.float64).eval()
    encoder = load_teacher(
        cache, LiveSettings(against_teacher=str(teacher_path), data=str(data_path))
    ).encoder  # tokens and positions are tested elsewhere
    data, found = Dataset(str(data_path)), {}

    def add(name, values):
        found.setdefault(name, []).extend(np.abs(np.atleast_1d(values)).ravel().tolist())

    for number in range(cache.n_samples):
        record, encoded = cache.record(number), encoder(data.sample(int(cache.sample_rows[number])))
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in encoded.inputs.items()}
        with torch.no_grad():
            answer = model(**inputs, output_hidden_states=True)
        logits, hidden = answer.logits[0, :, :26].numpy(), answer.hidden_states[-1][0].numpy()
        vision = np.flatnonzero(encoded.vision_mask.numpy())
        text = np.flatnonzero(~encoded.vision_mask.numpy())
        kinds = [("vision", place, row) for row, place in enumerate(vision)]
        kinds += [("answer", text[position] - 1, row) for row, position in enumerate(record.answer_positions)]
        for kind, place, row in kinds:
            top = getattr(record, kind)
            ids, stored = top.ids[row], top.logits[row].astype(np.float64)
            rest = np.array([logits[place, v] for v in range(26) if v not in ids])
            add(f"{kind}_logits", logits[place, ids] - stored)
            add(f"{kind}_order", max(0.0, rest.max() - stored.min()))
            add(f"{kind}_tail_logsumexp", np.log(np.exp(rest).sum()) - top.tail_logsumexp[row])
            if kind == "vision":
                add("vision_tail_mean", rest.mean() - record.vision.tail_mean[row])
        for i, a in enumerate(text):
            for j, b in enumerate(vision):
                cosine = hidden[a] @ hidden[b] / np.linalg.norm(hidden[a]) / np.linalg.norm(hidden[b])
                add("affinity", cosine - record.affinity[i, j])
    return found


def test_every_difference_is_what_a_plain_reference_finds(caches, other_path, data_path):
    """Of another teacher, so that no difference is 0; all samples."""
    report = compare(caches["float32"], other_path, data_path)
    expected = reference(Cache.open(caches["float32"]), other_path, data_path)
    assert report["samples"] == {"asked": 8, "compared": 6, "with_images": 5, "of": 6}
    assert set(report["differences"]) == set(expected)
    for name, entry in report["differences"].items():
        assert entry["n"] == len(expected[name]), name
        assert entry["mean"] == pytest.approx(np.mean(expected[name]), rel=1e-4), name
        assert entry["largest"] == pytest.approx(max(expected[name]), rel=1e-4), name
        assert entry["beyond"] == {"mean": entry["mean"], "largest": entry["largest"]}  # nothing is rounded
        assert not entry["agrees"], name


def test_chunks_change_nothing(caches, other_path, data_path, monkeypatch):
    """Logits of three tokens at a time, and of all."""
    whole = compare(caches["rounded"], other_path, data_path)
    monkeypatch.setattr(Teacher, "chunk", 3)
    parts = compare(caches["rounded"], other_path, data_path)
    for name, entry in whole["differences"].items():
        assert parts["differences"][name]["mean"] == pytest.approx(entry["mean"], rel=1e-5)
        assert parts["differences"][name]["worst"] == entry["worst"]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda r: {"vision_logits": r.vision.logits + 0.1}, {"vision_logits"}),
        (lambda r: {"vision_tail_logsumexp": r.vision.tail_logsumexp + 0.1}, {"vision_tail_logsumexp"}),
        (lambda r: {"vision_tail_mean": r.vision.tail_mean - 0.1}, {"vision_tail_mean"}),
        (lambda r: {"answer_logits": r.answer.logits - 0.1}, {"answer_logits", "answer_order"}),
        (lambda r: {"answer_tail_logsumexp": r.answer.tail_logsumexp + 0.1}, {"answer_tail_logsumexp"}),
        (lambda r: {"affinity": r.affinity * 0.9}, {"affinity"}),
    ],
)
def test_each_part_of_a_record_is_judged_by_itself(caches, teacher_path, data_path, monkeypatch, change, wrong):
    stored = Cache.record
    monkeypatch.setattr(Cache, "record", lambda cache, i: changed(r := stored(cache, i), **change(r)))
    report = compare(caches["float32"], teacher_path, data_path)
    found = {name for name, entry in report["differences"].items() if not entry["agrees"]}
    assert found - {"vision_order"} == wrong


def test_stored_ids_that_are_not_the_largest_are_found(caches, teacher_path, data_path):
    """The ninth largest logit instead of the third, with its correct value: only the order is wrong."""
    cache, data = Cache.open(caches["float32"]), Dataset(str(data_path))
    teacher = load_teacher(cache, LiveSettings(against_teacher=str(teacher_path), data=str(data_path)))
    record = cache.record(0)
    states = teacher.states(read(teacher, data, 0, record))
    with torch.inference_mode():
        live = teacher.logits(states.vision)
    ranked = live.sort(dim=1, descending=True)
    places = [0, 1, 3, 4, 5, 6, 7, 8]
    rest = live.scatter(1, ranked.indices[:, places], -torch.inf)
    swapped = replace(
        record,
        vision=TopLogits(
            ids=ranked.indices[:, places].int().numpy(),
            logits=ranked.values[:, places].numpy(),
            tail_logsumexp=rest.logsumexp(1).numpy(),
            tail_mean=rest.masked_fill(rest.isinf(), 0).sum(1).numpy() / (26 - K),
        ),
    )
    found = Differences(vocabulary=26, precision="float32", affinity_precision="float32")
    found.add(states, swapped, teacher.logits, teacher.chunk, 0)
    named = dict(found.named())
    assert named["vision_order"].largest == pytest.approx(float((ranked.values[:, 2] - ranked.values[:, 8]).max()))
    assert {name: each.largest for name, each in named.items() if each.largest > 1e-5} == {
        "vision_order": named["vision_order"].largest
    }


# What is tolerated: tests/inspection/compare/test_tolerance.py has the rule itself


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", [None, "eager"])
def test_a_good_cache_agrees(caches, teacher_path, data_path, kind, attention):
    report = compare(caches[kind], teacher_path, data_path, attn_implementation=attention)
    assert report["agrees"]
    assert report["attention"] == (attention or "sdpa")
    assert report["dtype"] == KINDS[kind]["dtype"]
    assert report["same"] == {"weights": True, "tokenizer": True, "chat_template": True}
    assert report["image_processor_differs_in"] == []
    assert report["worst"] is None
    check_agreement(report)
    assert all(entry["beyond"]["mean"] <= 0.5 * entry["tolerated"]["mean"] for entry in report["differences"].values())


def test_attention_is_that_of_the_cache(teacher_path, data_path, tmp_path):
    cache = tiny.make_cache(teacher_path, data_path, tmp_path / "cache", top_k=K, attn_implementation="eager")
    assert compare(cache, teacher_path, data_path, samples=1)["attention"] == "eager"
    assert compare(cache, teacher_path, data_path, samples=1, attn_implementation="sdpa")["attention"] == "sdpa"


@pytest.mark.parametrize("kind", KINDS)
def test_another_teacher_does_not(caches, other_path, data_path, kind):
    report = compare(caches[kind], other_path, data_path)
    assert not report["agrees"]
    assert not report["same"]["weights"]
    with pytest.raises(
        TeacherMismatchError, match=f"difference of .* on average .* a teacher in {KINDS[kind]['dtype']} may differ by"
    ):
        check_agreement(report)


@pytest.mark.parametrize(
    ("kind", "share", "agrees"),
    [("float32", 0.01, False), ("float32", 1e-4, True), ("rounded", 0.01, False), ("float16", 0.01, False),
     ("bfloat16", 0.1, False), ("bfloat16", 0.001, True)],
)  # fmt: skip
def test_a_little_training_is_noticed_where_the_dtype_lets_it(
    caches, teacher_path, data_path, tmp_path, kind, share, agrees
):
    changed = off_by(teacher_path, tmp_path / "teacher", share)
    report = compare(caches[kind], changed, data_path)
    assert report["agrees"] == agrees
    assert not report["same"]["weights"]


def test_what_the_disk_rounds_is_no_difference(caches, teacher_path, data_path):
    """The same float32 teacher, stored exactly and in bfloat16 with affinity in 8 bits."""
    exact = compare(caches["float32"], teacher_path, data_path)["differences"]
    rounded = compare(caches["rounded"], teacher_path, data_path)["differences"]
    for name in ("vision_logits", "affinity"):
        assert rounded[name]["largest"] > 1e-3
        assert rounded[name]["beyond"]["largest"] < 5e-6
        assert exact[name]["largest"] < 5e-6


def test_where_all_logits_are_stored_there_is_no_tail(cache_path, teacher_path, data_path):
    report = compare(cache_path, teacher_path, data_path)
    assert report["agrees"]
    assert set(report["differences"]) == {"vision_logits", "answer_logits", "affinity"}


# Which samples


def test_samples_are_spread_and_those_with_images_come_first(caches, data_path):
    cache = Cache.open(caches["float32"])
    selection = select(cache, Dataset(str(data_path)), print)
    assert [row for _, row in pick(cache, selection, 2)] == [0, 3]
    assert [row for _, row in pick(cache, selection, 5)] == [0, 1, 3, 4, 5]  # row 2 has no image
    assert [row for _, row in pick(cache, selection, 99)] == [0, 1, 2, 3, 4, 5]


def test_a_part_of_the_data_in_another_order(caches, teacher_path, tmp_path):
    rows = tiny.rows()
    data = tiny.write_data(tmp_path / "part.parquet", [rows[5], rows[1], rows[1]])
    report = compare(caches["bfloat16"], teacher_path, data)
    assert report["agrees"]
    assert report["samples"]["compared"] == report["samples"]["of"] == 2


def test_a_cache_without_images(teacher_path, tmp_path):
    data = tiny.write_data(tmp_path / "text.parquet", [tiny.rows()[2]])
    cache = tiny.make_cache(teacher_path, data, tmp_path / "cache", top_k=K, answer_top_k=K)
    report = compare(cache, teacher_path, data)
    assert set(report["differences"]) == {"answer_logits", "answer_order", "answer_tail_logsumexp"}
    assert report["samples"]["with_images"] == 0
    assert report["agrees"]


def test_a_cache_that_is_not_sealed(caches, teacher_path, data_path, tmp_path):
    """The first shard alone, and nothing at all."""
    manifest = read_manifest(open_files(caches["float32"]))
    files = create_cache(tmp_path / "empty", manifest, Cache.open(caches["float32"]).tokenizer_json)
    with pytest.raises(SampleNotFoundError, match="no sample yet"):
        compare(files.root, teacher_path, data_path)
    cache = tiny.make_cache(teacher_path, data_path, tmp_path / "cache", top_k=K)
    (cache / "seal.json").unlink()
    (cache / "index" / "000001.parquet").unlink()
    report = compare(cache, teacher_path, data_path)
    assert (report["agrees"], report["sealed"], report["samples"]["of"]) == (True, False, 4)


# What stands in the way


def test_another_tokenizer(caches, data_path, tmp_path):
    words = list(tiny.VOCABULARY)
    words[10], words[11] = words[11], words[10]
    other = tiny.save_model(tmp_path / "other", seed=1, hidden=32, words=words)
    with pytest.raises(
        UsageError,
        match="the live model's tokenizer is not the teacher's: 2 ids .*id 10: teacher 'picture', live model 'and'",
    ):
        compare(caches["float32"], other, data_path)
    more = tiny.save_model(tmp_path / "more", seed=1, hidden=32, words=[*tiny.VOCABULARY, "more"])
    with pytest.raises(
        UsageError,
        match="lacks 0 of the teacher's ids, and has 1 that the teacher's lacks .'more' .26... The cache was made by",
    ):
        compare(caches["float32"], more, data_path)


def test_another_chat_template(caches, teacher_path, data_path, tmp_path):
    model = tiny.save_model(tmp_path / "model", seed=1, hidden=32)
    processor = tiny.new_processor()
    processor.chat_template = tiny.TEMPLATE.replace("{{ m['role'] }}:", "{{ m['role'] }}: is")
    processor.save_pretrained(model)
    with pytest.raises(
        TeacherMismatchError,
        match="row 0: the live model's text has .* text token 1: live model 'is' .*, teacher 'what'",
    ):
        compare(caches["float32"], model, data_path)


def test_pictures_of_another_size(caches, data_path, tmp_path):
    model = tiny.save_model(tmp_path / "model", seed=1, hidden=32, side=30)
    with pytest.raises(
        TeacherMismatchError, match="row 0: .* are 36 at text token 1 for the live model, and 16 at text token 1 for"
    ):
        compare(caches["float32"], model, data_path)


def test_an_image_processor_that_changed_is_told(caches, data_path, tmp_path):
    """Another normalisation: the same tokens, other pixels, and the same weights."""
    model = tiny.save_model(tmp_path / "model", seed=1, hidden=32)
    processor = tiny.new_processor()
    processor.image_processor.image_mean = [0.1] * 3
    processor.save_pretrained(model)
    report = compare(caches["float32"], model, data_path)
    assert (report["same"]["weights"], report["image_processor_differs_in"]) == (True, ["image_mean"])
    with pytest.raises(
        TeacherMismatchError, match=r"Its weights are the ones .*Changed since then: its image processor \(image_mean\)"
    ):
        check_agreement(report)


def test_data_that_changed(caches, teacher_path, tmp_path):
    rows = tiny.rows()
    rows[3]["images"] = [tiny.png(99)]
    with pytest.raises(DataMismatchError, match="row 3"):
        compare(caches["float32"], teacher_path, tiny.write_data(tmp_path / "rows.parquet", rows))


def test_a_row_that_changed_and_was_not_looked_at(caches, teacher_path, data_path):
    cache = Cache.open(caches["float32"])
    teacher = load_teacher(cache, LiveSettings(against_teacher=str(teacher_path), data=str(data_path)))
    with pytest.raises(DataMismatchError, match="row 1 .id 'two'. of .* is not what the teacher saw"):
        read(teacher, Dataset(str(data_path)), 1, cache.record(0))


def test_no_memory_and_no_numbers(caches, teacher_path, data_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Teacher, "states", full)
    with pytest.raises(SampleError, match=r"out-of-memory: row 0 of .*: 26 tokens \(16 of vision\) do not fit"):
        compare(caches["float32"], teacher_path, data_path)
    monkeypatch.undo()
    monkeypatch.setattr("emkd.pipeline.capture.lm_logits", lambda model, h, n: torch.full((len(h), n), torch.nan))
    with pytest.raises(SampleError, match="not-finite: row 0 of .*: the teacher's logits are not finite"):
        compare(caches["float32"], teacher_path, data_path)


# On the command line


def test_what_is_printed(caches, teacher_path, other_path, data_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = inspect(capfd, caches["bfloat16"], "--against-teacher", teacher_path, "--data", data_path)
    assert code == 0
    assert "agrees: every quantity is within what a teacher in bfloat16 may differ by" in out
    assert re.search(r"samples +6 \(all that cache and data share; 8 were asked for\), 5 with images", out)
    table = out[out.index("live against cache") :].split("\n\n")[0].splitlines()
    assert [line.split()[:2] for line in table[1:3]] == [["vision", "logits"], ["vision", "order"]]
    assert len(table) == 9
    assert max(map(len, table)) <= 80
    code, out, err = inspect(
        capfd, caches["bfloat16"], "--against-teacher", other_path, "--data", data_path, "--samples", 2
    )  # fmt: skip
    assert code == 1
    assert "DOES NOT AGREE: 8 of 8 quantities" in out
    assert "2 of 6 that cache and data share" in out
    assert re.search(
        "emkd: .* does not reproduce .*: beyond .* It has other weights: the cache was made by teacher", err
    )


def test_a_narrow_terminal_cuts_no_number(caches, teacher_path, data_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = inspect(capfd, caches["bfloat16"], "--against-teacher", teacher_path, "--data", data_path)
    assert code == 0
    assert "…" not in out
    assert re.search(r"^vision tail logsumexp( +[-+.e0-9]+){6} +yes *$", out, re.MULTILINE)
    assert re.search(r"^VSD, uniform tail( +[-+.%0-9]+){6} *$", out, re.MULTILINE)


def test_table_verdict_and_error_name_the_same_quantity(caches, other_path, data_path, capfd):
    code, out, err = inspect(capfd, caches["float32"], "--against-teacher", other_path, "--data", data_path)
    assert code == 1
    (named,) = re.findall(r"8 of 8 quantities, ([a-z ]+) most, in sample \d", out)
    assert f"the difference of {named} is" in err
    assert re.search(rf"^{named} .* NO *$", out, re.MULTILINE)


def test_json_also_where_it_fails(caches, teacher_path, other_path, data_path, capfd):
    for teacher, expected in ((teacher_path, 0), (other_path, 1)):
        code, out, err = inspect(
            capfd, caches["float32"], "--json", "--against-teacher", teacher, "--data", data_path, "--samples", 1
        )  # fmt: skip
        assert code == expected
        report = json.loads(out)
        assert report["agrees"] == (expected == 0)
        assert report["samples"]["compared"] == 1
        assert ("does not reproduce" in err) == (expected == 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--against-teacher", "t"], "needs the data.*--data DATA"),
        (["--data", "d"], "--data works only with --against-teacher MODEL"),
        (["--samples", "3"], "--samples works only with --against-teacher"),
        (["--attn-implementation", "eager"], "--attn-implementation works only with"),
        (["--trust-remote-code"], "--trust-remote-code works only with"),
        (["--against-teacher", "t", "--data", "d", "--verify"], "leave out --sample, --list and --verify"),
        (["--against-teacher", "t", "--data", "d", "--sample", "one"], "leave out --sample, --list and --verify"),
        (["--against-teacher", "t", "--data", "d", "--samples", "0"], "--samples"),
        (["--against-teacher", "t", "--data", "nowhere"], "no data at nowhere"),
    ],
)
def test_wrong_calls(caches, capfd, flags, message):
    code, out, err = inspect(capfd, caches["float32"], *flags)
    assert (code, out) == (2, "")
    assert re.search(message, err)


def test_no_such_model(caches, data_path, capfd, tmp_path):
    code, _, err = inspect(capfd, caches["float32"], "--against-teacher", tmp_path / "no", "--data", data_path)
    assert (code, "no model" in err) == (2, True)


def test_ctrl_c(caches, teacher_path, data_path, capfd, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Teacher, "states", interrupted)
    code, _, err = inspect(capfd, caches["float32"], "--against-teacher", teacher_path, "--data", data_path)
    assert (code, "emkd: interrupted" in err) == (130, True)

"""docs/benchmarks.md and the tables of docs/method.md: each row equals the row written from benchmarks/results."""

import re

from emkd.trainer.recipe.recipe import Recipe
from tests.figures import (
    lm_learnt,
    lm_places,
    lm_range,
    lm_rows,
    lm_width,
    matching,
    page,
    results,
    table_rows,
)

PAGE = page("docs/benchmarks.md")
PROSE = " ".join(PAGE.split())

# Measured before this project began, as the page says.
NOT_OURS = ["| DistillKit, k = 50 | 123 | 2e-2 | |", "| DistillKit, k = 128 | 344 | 8e-2 | |"]


def matching_rows():
    found = results("matching")
    against, memory = found["cost"]["against_dense"], found["memory"]["median"]
    cost, head, whole_head, dense = matching()
    plain, chunked = memory["plain"], memory["chunked"]
    yield f"| cost matrix of a tile, 144 x 729 tokens | {dense:.1f} s | {cost:.0f} ms | {against['cost_speedup']:,.0f} times faster |"
    yield f"| the LM head for it | {whole_head:.0f} ms | {head:.0f} ms | {against['different_ids']:,} of 151,936 ids |"
    yield f"| VSD of 2,880 tokens, peak memory | {plain['peak_mib']:,.0f} MiB | {chunked['peak_mib']:,.0f} MiB | {found['peak_memory_ratio']:.2f} of it |"
    yield f"| the same, time | {plain['seconds']:.0f} s | {chunked['seconds']:.0f} s | {found['memory']['time_ratio']:.2f} of it |"


def step_rows():
    steps = results("step")["step_ratio"]
    names = ("cache/sft", "memory cache/sft", "dense teacher/cache", "teacher with our losses/cache")
    for case, text in (
        ("demo", "the demonstration's models"),
        ("cpu-larger", "a larger random pair, V = 32,000"),
        ("cpu-real", "a student of 0.5B, V = 151,936"),
        ("gpu", "that student and a teacher of 7B, on a GPU"),
    ):
        ratios = (f"{steps[case][name]:.2f}" if name in steps[case] else "not measured" for name in names)
        yield f"| {text} | {' | '.join(ratios)} |"


def storage_rows():
    found = results("storage")
    sizes, rates, ratios = (found[key] for key in ("bytes_per_vision_token", "read_samples_per_s", "read_ratios"))

    def level(k, precision):
        one = sizes[f"k={k} {precision}"]
        kl = f"{one['kl']:.1e}" if one["kl"] else "0"
        return f"| emkd, k = {k}, `{precision}` | {one['ids_and_logits']:.0f} | {kl} | {one['whole_record']:.0f} |"

    def reader(system, text):
        return f"| {text} | {rates['1'][system]:,.0f} | {rates['2'][system]:,.0f} |"

    yield from (level(k, precision) for k in (64, 128) for precision in ("bfloat16", "step0.1", "step0.2"))
    yield from (level(50, precision) for precision in ("step0.1", "step0.2"))
    yield f"| an entry of the affinity | {found['affinity_bytes_per_entry']:.3f} bytes, error at most {found['affinity_largest_error']:.4f} |"
    shared, own = found["sharing"]["median"].values()
    yield f"| 40% of rows share images: bytes of vision tokens | {shared['with']['vision_bytes'] / own['with']['vision_bytes']:.2f} of those of rows that do not |"
    yield from (reader(f"emkd-{codec}", f"emkd, {codec}, every byte checked") for codec in ("zstd", "lz4"))
    yield from (reader(f"mds-same-{codec}", f"MDS, the same arrays and codec, {codec}") for codec in ("zstd", "lz4"))
    yield from (reader(f"emkd-{codec}+kept", f"emkd, {codec}, memory kept") for codec in ("zstd", "lz4"))
    yield from (
        reader(f"mds-same-{codec}+kept", f"MDS, the same arrays, {codec}, memory kept") for codec in ("zstd", "lz4")
    )
    yield reader("zarr-slices", "slices of Zarr arrays, zstd")
    yield reader("raw-memmap", "raw numbers, memory-mapped")
    for codec in ("zstd", "lz4"):
        one, kept = (ratios[f"{codec}_over_mds_same_codec{end}"] for end in ("", "_kept"))
        yield (
            f"| reading: emkd / MDS with the same arrays, {codec} | {one['1']:.2f}, two processes {one['2']:.2f}; "
            f"memory kept {kept['1']:.2f}, {kept['2']:.2f} |"
        )


def job_rows():
    found, ahead = results("storage"), results("ahead")
    for case, text in (
        ("cpu-100m", "the job / the bare teacher, 0.1B, V = 151,936, on a CPU"),
        ("cpu-100m-32k", "the job / the bare teacher, 0.1B, V = 32,000, on a CPU"),
        ("demo", "the job / the demonstration's tiny teacher"),
    ):
        yield f"| {text} | {found['capture_overhead'][case]:.2f} |"
    yield f"| encoding and writing a sample of 2,916 vision tokens | {found['encode_ms']:.1f} ms of CPU |"
    yield f"| reading the next shard's rows during the teacher's passes / reading them first | {ahead['ahead_over_in_turn']:.2f}, when reading takes {ahead['reading_share']:.2f} of the time |"


def scale_rows():
    found = results("storage")
    index, driver = found["index"]["1000000"]["median"], found["driver"]["100000"]["median"]
    yield f"| 1,000,000 samples: open | {index['open_s']:.2f} s, {index['open_peak_mib']:,.0f} MiB |"
    yield f"| 1,000,000 samples: `emkd inspect` | {index['inspect_s']:.1f} s |"
    yield f"| 100,000 shards: driver, a shard | {driver['ms_per_shard']:.1f} ms, {driver['rss_growth_mib']:.0f} MiB more than after 500 shards |"
    assert results("start_time")["rows"] == 100_000
    for data, seconds in results("start_time")["median_s"].items():
        yield f"| {data} | {seconds['total']:.1f} |"


def tolerance_rows():
    found = results("tolerance")["share_of_tolerance"]
    dtypes = ("float32", "float16", "bfloat16")
    for cause in dict.fromkeys(cause for entry in found.values() for cause in entry):
        cells = []
        for dtype in dtypes:
            means = [
                entry[cause]["mean"] for name, entry in found.items() if name.startswith(f"{dtype},") and cause in entry
            ]
            cells.append(f"{min(means):.2f} to {max(means):.2f}" if means else "")
        yield re.sub(r" +", " ", f"| {cause} | {' | '.join(cells)} |")


def test_each_row_is_what_was_measured_and_no_other_row_is_there():
    makers = (matching_rows, step_rows, storage_rows, job_rows, scale_rows, tolerance_rows)
    expected = [row for maker in makers for row in maker()]
    found = table_rows(PAGE)
    for row in expected:
        assert row in found, row
    assert sorted(found) == sorted([*expected, *NOT_OURS])


def test_figures_in_the_text_are_what_was_measured():
    regret, seconds = results("matching")["regret"], results("inspect_time")["median_s"]
    reading = results("storage")["reading"]
    bytes_of, faults = reading["bytes_per_vision_token"], reading["read_page_faults_per_sample"]["1"]
    kept = reading["read_ratios"]["lz4_over_mds_same_codec_kept"]["1"]
    for text in (
        f"the assignment is {regret['near']:.2f} to {regret['far']:.2f} of the way from the best",
        f"`emkd inspect` on the demonstration's cache takes {seconds['inspect']:.1f} s; importing torch alone takes {seconds['import torch']:.1f} s",
        f"({bytes_of['mds-lz4']:.0f} bytes a vision token instead of {bytes_of['emkd-lz4']:.0f})",
        f"MDS is {1 / kept:.2f} times as fast",
        f"({results('storage')['cases']['demo']['parameters'] / 1e6:.2f} million parameters)",
        f"no page or {round(faults['mds-whole-zstd'], -1):.0f} pages a sample",
    ):
        assert text in PROSE.replace("**", ""), text


def test_what_is_lost_with_each_setting_is_what_was_measured():
    """docs/method.md, on a real language model; and how it grows with width, and where pairs lie."""
    text = page("docs/method.md")
    for row in lm_rows():
        assert row in text, row
    prose = " ".join(text.split())
    assert f"The same error took {lm_range()}, depending on the kind" in prose
    assert lm_width() in prose
    codes, top_64 = lm_learnt()
    assert f"{codes} of what it gains from the dense teacher; from the top 64 alone {top_64}." in prose
    assert f"by cost, is: {lm_places()}." in prose


def test_the_choice_of_the_tail_is_what_was_measured():
    """The figures of docs/method.md that choose it."""
    text, found = page("docs/method.md"), results("matching")["fidelity"]
    assert found["choice"]["tail"] == Recipe().losses.distance(has_codes=False).tail
    for loss in ("vsd", "rld"):
        bucket, uniform = (found["choice"]["gradient_cosine"][tail][loss] for tail in ("bucket", "uniform"))
        assert f"{uniform:.2f} against {bucket:.2f}" in " ".join(text.split())

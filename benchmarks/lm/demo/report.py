"""The table of lm_demo.py."""

from statistics import mean
from typing import Any

from emkd.demo.report import paired

NAMES = {
    "sft": "SFT: labels alone",
    "rld": "RLD: the teacher's answers",
    "emkd": "EM-KD: RLD + VSD + VLAD",
    "emkd-random": "EM-KD, matched at random",
    "rld+vsd": "RLD + VSD",
    "emkd-pooled": "EM-KD, matched by pooling",
}
READS = 0.85  # of a teacher's answers: below, its students say nothing about the method
PAIRED = ("sft", "rld", "emkd-random", "emkd-pooled", "rld+vsd")  # what EM-KD is compared with


def table(found: dict[str, Any], described: str) -> str:
    """Return the whole report. found: the content of the results file;  described: the size in words"""
    lines = [
        described,
        *([] if found["teacher"] >= READS else ["THE TEACHER DOES NOT READ WELL: the students below say nothing"]),
        f"GPU: {found['gpu']}",
        f"right answers on the {found['split']} pictures, which show all words at other places",
        "",
        f"  {'teacher, 64 vision tokens':<38}{100 * found['teacher']:6.1f}%",
        f"  {'student after phase 1, 16':<38}{100 * found['student-init']:6.1f}%",
    ]
    for variant, each in found["students"].items():
        seeds = " ".join(f"{100 * value:.1f}" for value in each)
        lines.append(f"  {NAMES[variant] + ', 16':<38}{100 * mean(each):6.1f}%   seeds: {seeds}")
    lines += ["", *differences(found["students"]), ""]
    lines.append("matched tokens that show the same word / lie in the same cell, before phase 2:")
    for matching, share in found["pairs"].items():
        lines.append(f"  {matching:<38}{100 * share['content']:5.0f}% / {100 * share['place']:.0f}%")
    lines += ["", f"cache: {found['cache']['bytes_per_vision_token']:.0f} bytes for each vision token"]
    worked = found["processor_seconds"]
    lines.append("time: " + ", ".join(f"{name} {value:.0f} s" for name, value in found["seconds"].items()))
    lines.append("of a processor: " + ", ".join(f"{name} {value:.0f} s" for name, value in worked.items()))
    return "\n".join(lines)


def differences(students: dict[str, list[float]]) -> list[str]:
    """Return a line for each variant that EM-KD is compared with: the difference, paired by seed."""
    lines = []
    for other in PAIRED:
        if "emkd" in students and other in students:
            difference, error = paired(students["emkd"], students[other])
            spread = f" ± {100 * error:.1f} (standard error)" if error is not None else " (one seed: no error known)"
            lines.append(f"  emkd - {other}: {100 * difference:+.1f} points{spread}")
    return lines

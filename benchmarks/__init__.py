"""Benchmarks: what README and docs claim in numbers, measured. README.md lists every script and its question.

common/     provenance of figures, memory and time of processes, synthetic teachers, random models
matching/   cost matrix, assignment, memory of the losses
fidelity/   what cutting and rounding the teacher changes
step/       one optimizer step
storage/    the cache: bytes, reading, writing, capturing, size
demo/       the demonstration: choices, seeds, conditions, and beside the teacher in memory
"""

"""What a user chooses for the teacher's job; the command line takes its defaults from here.

The command line imports this module to print `--help`, so that it imports nothing that takes time.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from emkd.clock import clock as as_clock
from emkd.errors import UsageError

if TYPE_CHECKING:
    from emkd.storage.manifest.manifest import AffinityForm, Compression
    from emkd.storage.precision import AffinityPrecision, LogitsPrecision

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """The arguments of `emkd cache-teacher`, by the same names. Raises UsageError for a wrong value.

    top_k, answer_top_k:  stored logits per vision token and per answer token; 0 means all V, and a top_k of None 8
                          with codes, 64 without
    logit_error:          predicted root mean square error of logits that are read from codes; "none" for no codes, None
                          for 0.8 unless that takes more than 160 bytes a vision token
    token_bytes:          most bytes of ids, logits, tails and codes of a vision token
    affinity:             "stored", or "codes" to compute it from codes of text and vision tokens
    head_memory:          MiB that the LM head, projected to the codes' columns, may take; it limits the columns
    precision:            of the stored logits; the manifest calls it `logits_precision`
    batch_tokens:         padded tokens of one forward pass
    max_length:           longest sample in tokens; None means the model's own limit
    max_skipped:          share of the rows that may be skipped before the job fails
    limit:                use only the first rows; None means all
    follow_links:         links inside the image root may lead out of it
    for_student:          a student that must be able to use the cache; the cache does not record it
    clock:                the date that the chat template writes, if it writes one; None for today's, or the cache's own
    """

    teacher: str
    data: str
    cache: str
    image_root: Path | None = None
    follow_links: bool = False
    top_k: int | None = None
    answer_top_k: int = 64
    logit_error: "float | Literal['none'] | None" = None
    token_bytes: int | None = None
    affinity: "AffinityForm" = "stored"
    head_memory: int = 512
    precision: "LogitsPrecision" = "bfloat16"
    affinity_precision: "AffinityPrecision" = "int8"
    compression: "Compression" = "zstd"
    workers: int = 1
    gpus_per_worker: float = 1
    address: str | None = None
    batch_tokens: int = 8192
    rows_per_shard: int = 256
    max_length: int | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    limit: int | None = None
    max_skipped: float = 0.01
    for_student: str | None = None
    clock: str | None = None

    def __post_init__(self) -> None:
        from emkd.storage.manifest.manifest import AffinityForm, Compression
        from emkd.storage.precision import AffinityPrecision, LogitsPrecision

        _one_of("--affinity", self.affinity, get_args(AffinityForm))
        _one_of("--precision", self.precision, get_args(LogitsPrecision))
        _one_of("--affinity-precision", self.affinity_precision, get_args(AffinityPrecision))
        _one_of("--compression", self.compression, get_args(Compression))
        _one_of("--dtype", self.dtype, DTYPES)
        for flag, value, least in (
            ("--top-k", self.top_k, 0),
            ("--answer-top-k", self.answer_top_k, 0),
            ("--token-bytes", self.token_bytes, 1),
            ("--head-memory", self.head_memory, 1),
            ("--workers", self.workers, 1),
            ("--gpus-per-worker", self.gpus_per_worker, 0),
            ("--batch-tokens", self.batch_tokens, 1),
            ("--rows-per-shard", self.rows_per_shard, 1),
            ("--max-length", self.max_length, 1),
            ("--limit", self.limit, 1),
        ):
            if value is not None and value < least:
                raise UsageError(f"{flag} {value}: expected at least {least}")
        if isinstance(self.logit_error, str):
            _one_of("--logit-error", self.logit_error, ("none",))
        elif self.logit_error is not None and not 0 < self.logit_error < math.inf:
            raise UsageError(f"--logit-error {self.logit_error}: expected a number above 0, or none")
        if self.logit_error == "none" and (self.token_bytes is not None or self.affinity == "codes"):
            flag = "--affinity codes" if self.token_bytes is None else "--token-bytes"
            raise UsageError(f"{flag} needs codes, and --logit-error none stores none; leave out one of the two")
        if self.clock is not None:
            as_clock(self.clock)  # raises for what is none
        if not 0 <= self.max_skipped <= 1:
            raise UsageError(f"--max-skipped {self.max_skipped}: expected a share between 0 and 1")

    def with_absolute_paths(self) -> "JobSettings":
        """The same settings with absolute local paths: Ray's workers run in other folders."""
        from emkd.samples.sources.find import absolute_data

        return replace(
            self,
            teacher=_model(self.teacher) or self.teacher,
            for_student=_model(self.for_student),
            data=absolute_data(self.data),
            cache=self.cache if "://" in self.cache else _absolute(self.cache),
            image_root=None if self.image_root is None else Path(_absolute(str(self.image_root))),
        )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _model(name: str | None) -> str | None:
    """A folder as an absolute path; a name on the hub unchanged."""
    return _absolute(name) if name is not None and Path(name).expanduser().is_dir() else name


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{flag} {value!r}: expected one of {', '.join(known)}")

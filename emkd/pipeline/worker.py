"""One worker of the teacher's job: it holds the teacher and captures whole shards. A plain class; actors.py makes it
a Ray actor.

The worker loads the teacher on its first call, not when it is made, so that a restarted worker loads it again and an
error while loading reaches the user unchanged.
"""

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from emkd.background import BackgroundConsumer
from emkd.clock import clock_of_cache
from emkd.errors import DamagedCacheError, DataMismatchError, JobFailedError, ModelError
from emkd.pipeline.basis_choice import BasisChooser, Choice, sample_states
from emkd.pipeline.cache_size import Sizes, measure_sizes
from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.pipeline.read_ahead import ReadAhead
from emkd.pipeline.row_reader import RowReader, read_row
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.shared_images import SharedImages
from emkd.pipeline.skipped import Skipped, SkippedRow, skipped_among
from emkd.samples.dataset import Dataset
from emkd.samples.render import end_token, template_of
from emkd.storage.basis import Basis, read_basis
from emkd.storage.index.commit import LogitError, ShardIndex, commit_shard
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.manifest.read import read_manifest
from emkd.storage.objects.files import Files
from emkd.storage.objects.open import open_files
from emkd.storage.record import CapturedRow
from emkd.storage.shards.writer import ShardWriter
from emkd.vlm.checks import check_teacher
from emkd.vlm.codes import Codes
from emkd.vlm.forward import full_float32
from emkd.vlm.identity import image_processor_settings, model_config, sha256_of, tokenizer_json, weights_sha256
from emkd.vlm.loading import VisionLanguageModel, load

# Limit for records that wait to be encoded: the rows of several batches, or a few very large samples.
HELD_BYTES = 256 * 2**20
# Limit for pixels that wait for the turn of their shard: a few hundred images in tiles.
AHEAD_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """The outcome of one shard.

    committed:   False if another run committed the shard first
    n_halved:    rows of batches that had to be halved because they did not fit the memory
    n_shared:    images that are stored with those of other rows
    n_different: images that should have been, but differ (see `SharedImages`)
    logit_error: measured, of logits that are read from codes; None without codes
    skipped:     the reasons of the skipped rows
    """

    number: int
    committed: bool
    n_samples: int
    n_skipped: int
    n_halved: int
    n_shared: int
    n_different: int
    n_bytes: int
    seconds: float
    logit_error: LogitError | None = None
    skipped: Skipped = field(default_factory=Skipped)


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a few rows cost.

    sizes, seconds: on disk, and in time
    vision_tokens:  of all rows together
    skipped:        the rows that cannot be used
    unread:         those among further rows, which did not go through the teacher, that cannot be read
    end_token:      whether answers end in a special token
    logit_error, predicted: measured and predicted error of logits that are read from codes; None without codes
    """

    n_rows: int
    sizes: Sizes
    seconds: float
    vision_tokens: int
    skipped: tuple[SkippedRow, ...]
    end_token: bool
    logit_error: LogitError | None = None
    predicted: float | None = None
    unread: tuple[SkippedRow, ...] = ()


class CaptureWorker:
    """Captures shards of one job, one after the other.

    settings: where things are on this machine: model, data, cache, devices
    manifest: everything that decides the numbers: dtype, attention, batches, precision
    """

    def __init__(self, settings: JobSettings, manifest: Manifest) -> None:
        self.settings, self.manifest = settings, manifest
        self._follows_cache = False
        self._teacher: Teacher | None = None
        self._dataset: Dataset | None = None
        self._ahead = ReadAhead(self._reading, AHEAD_BYTES)

    def choose_basis(self, rows: Sequence[int]) -> Choice:
        """Make a basis for the codes that the manifest asks for, from some rows.

        Raises JobFailedError if none of them can be used.
        """
        asked = self.manifest.codes
        if asked is None:
            raise ValueError("the manifest asks for no codes")
        return self._chooser(rows).choose(asked)

    def study(
        self,
        measure: Callable[[BasisChooser, Teacher, Dataset, Sequence[int]], Any],
        fitted: Sequence[int],
        measured: Sequence[int],
    ) -> Any:
        """Return what `measure` finds about possible bases, or {missing: reason} if this teacher can have none.

        They are fitted to some rows and measured on others.
        """
        try:
            chooser = self._chooser(fitted)
        except (ModelError, JobFailedError) as error:
            return {"missing": str(error)}
        teacher, dataset = self._loaded()
        return measure(chooser, teacher, dataset, measured)

    def _chooser(self, rows: Sequence[int]) -> BasisChooser:
        teacher, dataset = self._loaded()
        sample = sample_states(teacher, dataset, rows)
        if not sample.halves:
            raise JobFailedError(f"none of the {len(rows)} rows checked can be used; the first is {sample.unusable[0]}")
        try:
            return BasisChooser(teacher, sample, self.manifest, self.settings.head_memory << 20)
        except ModelError as error:
            raise ModelError(f"{error}. A cache of this teacher has no codes: use --logit-error none") from error

    def preflight(self, rows: Sequence[int], choice: Choice | None = None, read: Sequence[int] = ()) -> Preflight:
        """Run some rows through the whole job, into a temporary folder.

        choice: the basis of a cache that does not exist yet
        read: further rows, which are only read
        """
        teacher, dataset = self._loaded()
        basis = self._read_basis() if choice is None else choice.basis
        manifest, n_bytes = self.manifest, len(tokenizer_json(teacher.vlm.path))
        if basis is not None:
            data = basis.to_bytes()
            manifest, n_bytes = manifest.with_basis(basis.identity(data)), n_bytes + len(data)
            teacher.codes = Codes(basis, teacher.vlm.device)
            self._follows_cache = choice is None
        started = time.perf_counter()
        captured = teacher.capture(dataset, rows, SharedImages(manifest.teacher.dtype))
        sizes = measure_sizes(captured, manifest, n_bytes, self.settings.rows_per_shard)
        return Preflight(
            n_rows=len(captured),
            sizes=sizes,
            seconds=time.perf_counter() - started,
            vision_tokens=sum(len(row.record.vision) for row in captured if row.record is not None),
            skipped=skipped_among(captured),
            unread=self._unread(read),
            end_token=end_token(teacher.vlm.processor) is not None,
            logit_error=LogitError.of([error for row in captured for error in row.squared_error]),
            predicted=None if basis is None else basis.logit_error,
        )

    def _unread(self, rows: Sequence[int]) -> tuple[SkippedRow, ...]:
        """Rows that cannot be read; of the others nothing is kept, so that many fit."""
        teacher, dataset = self._loaded()
        found = (read_row(teacher.encoder, dataset, row) for row in rows)
        return skipped_among(row for row in found if isinstance(row, CapturedRow))

    def capture_shard(self, number: int, following: int | None = None) -> ShardReport:
        """Capture, write and commit one shard of the plan.

        following: the worker's probable next shard, whose rows are read meanwhile
        """
        teacher, dataset = self._loaded()
        self._check_dataset(dataset, self.manifest.source(number))
        self._follow_cache(teacher)
        started = time.perf_counter()
        files = open_files(self.settings.cache)
        counts: Counter[str] = Counter()
        skipped = Skipped()
        shared = SharedImages(self.manifest.teacher.dtype)
        reading = self._ahead.take(number)
        reading.advance()
        if following is not None:
            self._ahead.start(following)
        captured = teacher.captured(reading, shared)
        index = self._write(files, number, _counted(captured, counts, skipped))
        return ShardReport(
            number=number,
            committed=commit_shard(files, index),
            n_samples=counts["samples"],
            n_skipped=skipped.n,
            n_halved=counts["halved"],
            n_shared=shared.n_shared,
            n_different=shared.n_different,
            n_bytes=stored_bytes(index),
            logit_error=index.logit_error,
            skipped=skipped,
            seconds=time.perf_counter() - started,
        )

    def _follow_cache(self, teacher: Teacher) -> None:
        """Use the cache's own basis and date: of two jobs that start at once, one finds those of the other."""
        if self._follows_cache:
            return
        basis = self._read_basis()
        if basis is not None:
            teacher.codes = Codes(basis, teacher.vlm.device)
        self.manifest = self.manifest.model_copy(update={"clock": self._read_manifest().clock})
        teacher.use_clock(self.manifest.clock or teacher.settings.clock)
        self._follows_cache = True

    def _read_basis(self) -> Basis | None:
        """Read the basis from the cache, and put it into the manifest; None if there are no codes."""
        if self.manifest.codes is None:
            return None
        identity = self._read_manifest().basis
        if identity is None:
            raise DamagedCacheError(
                f"{self.settings.cache}: its manifest names no basis of codes, and the job's has some"
            )
        self.manifest = self.manifest.with_basis(identity)
        return read_basis(open_files(self.settings.cache), identity)

    def _read_manifest(self) -> Manifest:
        return read_manifest(open_files(self.settings.cache), extensions=0)

    def _reading(self, number: int) -> RowReader:
        teacher, dataset = self._loaded()
        return teacher.reading(dataset, self.manifest.rows(number))

    def _write(self, files: Files, number: int, captured: Iterable[CapturedRow]) -> ShardIndex:
        """Encode and write rows during the teacher's next pass. Leaves no files if it fails or is interrupted."""
        writer = ShardWriter(files, number, uuid.uuid4().hex[:12], self.manifest)
        try:
            with BackgroundConsumer(writer.add, record_bytes, HELD_BYTES, "emkd-write") as rows:
                for row in captured:
                    rows.put(row)
            return writer.finish()
        except BaseException:
            writer.abandon()
            raise

    def _loaded(self) -> tuple[Teacher, Dataset]:
        if self._teacher is None or self._dataset is None:
            full_float32()
            self._dataset = Dataset(self.settings.data, self.settings.image_root, self.settings.follow_links)
            vlm = load(
                self.settings.teacher,
                revision=self.manifest.teacher.revision,
                dtype=self.manifest.teacher.dtype,
                attn_implementation=self.manifest.teacher.attn_implementation,
                device="cuda" if self.settings.gpus_per_worker else "cpu",
                trust_remote_code=self.settings.trust_remote_code,
            )
            self._check(vlm)
            vlm.n_tokens = (
                self.manifest.vocabulary_size
            )  # of an older cache, a tokenizer's ids beyond a gap are left out
            clock = clock_of_cache(
                self.settings.cache, template_of(vlm.processor), self.manifest.clock, self.settings.clock
            )
            self._teacher = Teacher(vlm, CaptureSettings.of(self.manifest, clock))
            self._check_family(self._teacher, self._dataset)
        return self._teacher, self._dataset

    def _check_dataset(self, dataset: Dataset, source: int) -> None:
        """Raise DataMismatchError if the dataset on this machine is not the one of the plan."""
        if dataset.fingerprint != self.manifest.datasets[source].fingerprint:
            raise DataMismatchError(
                f"{self.settings.data}: the files on this machine differ from the driver's; put the same data "
                "on every machine"
            )

    def _check(self, vlm: VisionLanguageModel) -> None:
        rows = vlm.model.get_output_embeddings().weight.shape[0]
        expected = self.manifest.tokenizer.lm_head_rows
        if rows != expected:
            raise ModelError(f"{self.settings.teacher}: its LM head has {rows} rows, its config says {expected}")
        if weights_sha256(vlm.path) != self.manifest.teacher.weights_sha256:
            raise ModelError(
                f"{self.settings.teacher}: the weights on this machine differ from the teacher's in the cache; "
                "put the same checkpoint on every machine, or name a --revision"
            )
        differing = self._differing(vlm)
        if differing:
            raise ModelError(
                f"{self.settings.teacher}: on this machine it has another {' and another '.join(differing)} than in "
                "the cache's manifest; put the same files and the same versions of transformers and torchvision on "
                "every machine, and do not change them while the job runs"
            )

    def _differing(self, vlm: VisionLanguageModel) -> list[str]:
        """What else decides the numbers, besides weights, and is not as the manifest says."""
        manifest, processor = self.manifest, vlm.processor
        pixels = image_processor_settings(processor)
        found = {
            "config.json": manifest.teacher.config in (None, model_config(vlm.path)),
            "tokenizer": manifest.tokenizer.sha256 == sha256_of(json.loads(tokenizer_json(vlm.path))),
            "chat template": manifest.tokenizer.chat_template_sha256 in (None, sha256_of(processor.chat_template)),
            f"image processor ({_names(manifest.image_processor.settings, pixels)})": (
                manifest.image_processor.sha256 == sha256_of(pixels)
            ),
            f"kind of image processor ({type(processor.image_processor).__name__})": (
                manifest.image_processor.class_name == type(processor.image_processor).__name__
            ),
        }
        return [name for name, same in found.items() if not same]

    def _check_family(self, teacher: Teacher, dataset: Dataset) -> None:
        """Check on the first usable row that emkd's logits are those of the model's own forward pass."""
        encoded = teacher.first_usable(dataset, range(dataset.n_rows))
        if encoded is not None:
            check_teacher(teacher.vlm, encoded, teacher.pad_token_id)


def _names(then: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name)))


def _counted(captured: Iterable[CapturedRow], counts: Counter[str], skipped: Skipped) -> Iterator[CapturedRow]:
    """Yield the same rows, and count their outcomes."""
    for row in captured:
        counts["samples"] += row.record is not None
        skipped.add(Skipped.of(skipped_among([row])))
        counts["halved"] += row.halvings > 0
        yield row


def record_bytes(row: CapturedRow) -> int:
    """Bytes of a row's arrays."""
    return 0 if row.record is None else row.record.n_bytes


def stored_bytes(index: ShardIndex) -> int:
    """Bytes of all objects of a shard."""
    return sum(digest.n_bytes for digest in index.objects.values())

"""The teacher's pass over the rows of a shard: samples in, records out. No Ray here; runs on any device.

    RowReader --batches--> one forward each --top-k in chunks on the device--> Record

A row that cannot be used is a CapturedRow with its reason (see row_reader), and affects no other row. A batch that does
not fit the memory is halved until it does; the CapturedRow of each of its rows records how often.

Shape legend: B rows of a batch, T tokens of the longest one, d hidden size, n tokens, V ids of the tokenizer
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from emkd.errors import ModelError, SampleError
from emkd.pipeline.batching import batches
from emkd.pipeline.out_of_memory import OUT_OF_MEMORY, free_memory, rows_that_fit, unless_out_of_memory
from emkd.pipeline.row_reader import EncodedRow, RowReader
from emkd.pipeline.shared_images import SharedImages
from emkd.pipeline.topk import top_k_in_chunks
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoded, Encoder
from emkd.storage.arrays.layout import TOKEN_AXES, TokenAxis
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.precision import STEPS
from emkd.storage.record import CapturedRow, Record
from emkd.vlm.affinity import affinity
from emkd.vlm.codes import NOT_FINITE, Codes
from emkd.vlm.forward import collate, head_logits, last_hidden_state, lm_logits, to_model
from emkd.vlm.loading import VisionLanguageModel
from emkd.vlm.states import States
from emkd.vlm.truncated import TruncatedLogits

# What logits are rounded to before the k largest are chosen. Multiples of a step are so coarse that ties among them
# would be decided by id: there the exact logits decide, and the writer rounds.
STORED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16} | dict.fromkeys(
    ("float32", *STEPS), torch.float32
)

# Vision tokens of a row whose logits are compared with those read from codes.
MEASURED_VISION = 3


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """What a teacher's pass keeps, and how it runs.

    coded:         of which tokens codes are kept
    affinity:      whether affinities are kept
    clock:         the date that the chat template writes, if it writes one
    batch_tokens:  padded tokens of one forward pass
    chunk_logits:  logits that are in memory at a time while the top-k is taken
    """

    top_k: int
    answer_top_k: int
    logits_precision: str
    batch_tokens: int
    max_length: int | None
    chunk_logits: int = 1 << 26
    coded: tuple[TokenAxis, ...] = ()
    affinity: bool = True
    clock: str | None = None

    @classmethod
    def of(cls, manifest: Manifest, clock: str | None = None) -> "CaptureSettings":
        """Return the settings that the manifest records; a user cannot choose others for the same cache.

        clock: for a manifest that does not keep the date that its template writes
        """
        return cls(
            top_k=manifest.top_k,
            answer_top_k=manifest.answer_top_k,
            logits_precision=manifest.logits_precision,
            batch_tokens=manifest.batch_tokens,
            max_length=manifest.max_length,
            coded=tuple(tokens for tokens in TOKEN_AXES if manifest.has_codes(tokens)),
            affinity=manifest.stores_affinity,
            clock=manifest.clock or clock,
        )


class Teacher:
    """A loaded teacher that turns rows of a dataset into records.

    codes: on the teacher's device; needed to capture if the settings keep codes
    """

    def __init__(self, vlm: VisionLanguageModel, settings: CaptureSettings, codes: Codes | None = None) -> None:
        self.vlm, self.settings, self.codes = vlm, settings, codes
        self.encoder = Encoder(vlm.processor, vlm.image_token_id, settings.max_length, settings.clock)

    @property
    def pad_token_id(self) -> int:
        """The id that pads a batch; attention masks it, so that any id will do (`_alone` has the exception)."""
        return self.vlm.processor.tokenizer.pad_token_id or 0

    def use_clock(self, clock: str | None) -> None:
        """Render with another date from now on."""
        if clock != self.settings.clock:
            self.settings = replace(self.settings, clock=clock)
            self.encoder = Encoder(self.vlm.processor, self.vlm.image_token_id, self.settings.max_length, clock)

    def first_usable(self, dataset: Dataset, rows: Iterable[int]) -> Encoded | None:
        """The first of the rows that can be encoded, or None."""
        for row in rows:
            try:
                with rows_that_fit():
                    return self.encoder(dataset.sample(row))
            except SampleError:
                continue  # capture() records the reason when its turn comes
        return None

    def capture(self, dataset: Dataset, rows: Iterable[int], shared: SharedImages | None = None) -> list[CapturedRow]:
        """Read rows and capture them; the results are in the order of the rows."""
        order = list(rows)
        found = {result.hint.row: result for result in self.captured(self.reading(dataset, order), shared)}
        return [found[row] for row in order]

    def reading(self, dataset: Dataset, rows: Iterable[int]) -> RowReader:
        """A reader of these rows for this teacher; it has not read any yet."""
        return RowReader(self.encoder, dataset, rows)

    def captured(self, reading: RowReader, shared: SharedImages | None = None) -> Iterator[CapturedRow]:
        """Yield a CapturedRow for each row as soon as it is done: rows that cannot be used, then batch by batch.

        reading: read completely first: batches depend on all lengths, and the longest rows come first
        shared:  gives rows that show one image the same logits; without it, each row keeps its own
        """
        reading.advance()
        yield from reading.skipped
        if shared is not None:
            shared.expect(key for row in reading.usable for key in row.encoded.image_keys)
        for result in self._capture_encoded(reading.usable):
            yield result if shared is None else shared.apply(result)

    def _capture_encoded(self, usable: list[EncodedRow]) -> Iterator[CapturedRow]:
        """Capture batch by batch. Empties `usable`, so that the pixels of a batch are freed when it is done."""
        planned = batches([row.encoded.n_tokens for row in usable], self.settings.batch_tokens)
        waiting: deque[list[EncodedRow]] = deque([usable[position] for position in positions] for positions in planned)
        usable.clear()
        while waiting:
            yield from self._whole_batch(waiting.popleft())

    def _whole_batch(self, batch: Sequence[EncodedRow]) -> list[CapturedRow]:
        longest = max(row.encoded.n_tokens for row in batch)
        return [
            self._alone(row, result) if row.encoded.n_tokens < longest and result.reason == NOT_FINITE else result
            for row, result in zip(batch, self._capture_batch(batch), strict=True)
        ]

    def _alone(self, row: EncodedRow, result: CapturedRow) -> CapturedRow:
        """Capture the row again without padding: it is skipped only if it is not finite even then.

        Attention gives padding a weight of zero, but zero times a padding token that is not finite (its embedding,
        or an overflow in float16) is NaN.
        """
        return replace(self._capture_batch([row])[0], halvings=result.halvings)

    def _capture_batch(self, batch: Sequence[EncodedRow], halvings: int = 0) -> list[CapturedRow]:
        """Capture the batch in as many forward passes as memory requires. Other batches stay as planned."""
        results = unless_out_of_memory(lambda: self._forward(batch))
        if results is None:
            free_memory(self.vlm.device)
            if len(batch) > 1:
                half = len(batch) // 2
                first = self._capture_batch(batch[:half], halvings + 1)
                return first + self._capture_batch(batch[half:], halvings + 1)
            (row,) = batch
            results = [row.skipped(does_not_fit(row.encoded))]
        return [replace(result, halvings=halvings) for result in results]

    @torch.inference_mode()
    def _forward(self, batch: Sequence[EncodedRow]) -> list[CapturedRow]:
        """One pass of the teacher. Its memory on the device is free once it has returned, or once its error is gone."""
        hidden = self._hidden([row.encoded for row in batch])
        results = []
        for row, states in zip(batch, hidden, strict=True):
            try:
                found = States.of(row.encoded, states)
                record = self._record(row.encoded, found)
                results.append(replace(row.captured(record), squared_error=self._squared_errors(record, found)))
            except SampleError as error:
                results.append(row.skipped(error))
        return results

    @torch.inference_mode()
    def states(self, item: Encoded) -> States:
        """The hidden states of a single sample, before anything is cut or rounded."""
        return States.of(item, self._hidden([item])[0])

    def _hidden(self, items: Sequence[Encoded]) -> torch.Tensor:
        """[B, T, d] last hidden states of one pass of the teacher."""
        inputs = to_model(collate(items, self.pad_token_id), self.vlm.model)
        hidden = last_hidden_state(self.vlm.model, inputs)
        _check_shape(inputs["input_ids"], hidden)
        return hidden

    def _record(self, item: Encoded, states: States) -> Record:
        vision = self.top_k(states.vision, self.settings.top_k)
        answer = self.top_k(states.predicting, self.settings.answer_top_k)
        text_codes = self._coded("text", states.text)
        return Record(
            key=item.key,
            text_ids=_int32(item.text_ids),
            images=item.images,
            vision=replace(vision, codes=self._coded("vision", states.vision)).top_logits(),
            affinity=_affinity(states) if self.settings.affinity else None,
            answer_positions=_int32(item.answer_positions),
            answer=replace(answer, codes=self._coded("answer", states.predicting)).top_logits(mean=False),
            text_codes=None if text_codes is None else text_codes.cpu().numpy(),
        )

    def _coded(self, tokens: TokenAxis, hidden: torch.Tensor) -> torch.Tensor | None:
        """Codes [n, r] of hidden states [n, d], None if the settings keep none of these tokens."""
        if tokens not in self.settings.coded:
            return None
        if self.codes is None:
            raise ValueError("the settings keep codes, and the teacher has no basis")
        return self.codes.encode(hidden)

    def _squared_errors(self, record: Record, states: States) -> tuple[float, ...]:
        """Mean square error, over V, of the logits read from the codes of a few of the record's tokens."""
        found: list[float] = []
        for top, hidden, n in ((record.vision, states.vision, MEASURED_VISION), (record.answer, states.predicting, 1)):
            if top.codes is None or not len(top) or self.codes is None:
                continue
            chosen = [(2 * i + 1) * len(top) // (2 * n) for i in range(min(n, len(top)))]
            read = self.codes.logits(torch.from_numpy(top.codes[chosen]).to(hidden.device))
            found += (read - self.logits(hidden[chosen])).double().square().mean(dim=1).tolist()
        return tuple(found)

    @torch.inference_mode()
    def top_k(self, hidden: torch.Tensor, k: int) -> TruncatedLogits:
        """The k largest logits of hidden states [n, d] and their tails, as the cache stores them.

        Raises SampleError if a logit is not finite.
        """
        stored = STORED_DTYPES[self.settings.logits_precision]
        top = top_k_in_chunks(hidden, self._head, k, stored, self.chunk)
        if not top.is_finite:  # rare, and visible in what is kept; only now each logit is checked
            for rows in hidden.split(self.chunk):
                self.logits(rows)
            _check_finite("logits rounded to the cache's precision", top.logits)
        return top

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return head_logits(self.vlm.model, hidden, self.vlm.n_tokens)

    @property
    def chunk(self) -> int:
        """Tokens whose logits are in memory at a time."""
        return max(1, self.settings.chunk_logits // self.vlm.n_tokens)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits [n, V] of hidden states [n, d].

        Raises SampleError if they are not finite: then they have no order and no top-k.
        """
        logits = lm_logits(self.vlm.model, hidden, self.vlm.n_tokens)
        _check_finite("the teacher's logits", logits)
        return logits


def _check_shape(ids: torch.Tensor, hidden: torch.Tensor) -> None:
    """Raise ModelError if the model inserts further tokens: they would shift all positions of `Encoded`."""
    if hidden.shape[:2] != ids.shape:
        raise ModelError(
            f"the model returns {tuple(hidden.shape[:2])} hidden states for {tuple(ids.shape)} tokens: it expands "
            "images itself, but its processor has to do that; save the checkpoint with a current transformers"
        )


def does_not_fit(item: Encoded) -> SampleError:
    """The error for a sample that does not fit the memory even alone."""
    return SampleError(
        OUT_OF_MEMORY,
        f"{item.n_tokens} tokens ({item.n_vision} of vision) do not fit the device's memory even alone; use a device "
        "with more memory, --attn-implementation sdpa instead of eager, or a smaller image",
    )


def _affinity(states: States) -> np.ndarray:
    cosine = affinity(states.text, states.vision)
    _check_finite("the affinities", cosine)
    return cosine.float().cpu().numpy()


def _check_finite(what: str, tensor: torch.Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        raise SampleError(NOT_FINITE, f"{what} are not finite ({int((~tensor.isfinite()).sum())} of {tensor.numel()})")


def _int32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.int32).cpu().numpy()

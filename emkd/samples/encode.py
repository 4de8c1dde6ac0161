"""A Sample as a model's processor sees it: token ids, text, vision and answer tokens, image spans.

    Sample --render--> text + answer characters --processor--> token ids --offsets--> Encoded

All families are handled in the same way: the processor expands each image placeholder into vision tokens and reports
which characters it replaced, and the tokenizer reports the characters of each token. So emkd does not need to know the
wrappers, tiles or newlines of a family.

Shape legend: T all tokens of the sample, L text tokens, Nt vision tokens, A answer tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any

import torch
import xxhash
from PIL import Image

from emkd.errors import SampleError
from emkd.samples.geometry import tile_grids
from emkd.samples.images import decode_image
from emkd.samples.process import Process, Processed
from emkd.samples.render import Span, render
from emkd.samples.sample import Sample, Turn
from emkd.samples.template import image_text
from emkd.storage.record import ImageSpan


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The inputs of a model for one sample, and the positions of its tokens.

    inputs:            the processor's tensors, with a leading batch axis of 1 on token tensors
    vision_mask:       [T] bool, True at vision tokens
    text_positions:    [L] full-sequence positions of text tokens
    text_ids:          [L]
    in_image:          [L] bool, True for text tokens that the family writes around and within images, and for white
                       space next to them, which may have merged into one token with them
    answer_positions:  [A] index into text_ids of each answer token
    images:            spans into the Nt vision tokens
    image_keys:        of each image, a hash of all tokens and images that the model sees up to its end. To a causal
                       model, images of equal keys are the same tokens, independent of what follows
    """

    key: str
    inputs: dict[str, torch.Tensor]
    vision_mask: torch.Tensor
    text_positions: torch.Tensor
    text_ids: torch.Tensor
    in_image: torch.Tensor
    answer_positions: torch.Tensor
    images: tuple[ImageSpan, ...]
    image_keys: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        return int(self.vision_mask.numel())

    @property
    def n_vision(self) -> int:
        return int(self.vision_mask.sum())

    @property
    def n_bytes(self) -> int:
        """Bytes of the inputs, nearly all of them pixels."""
        return sum(tensor.nbytes for tensor in self.inputs.values())

    @property
    def predicting_positions(self) -> torch.Tensor:
        """[A] full-sequence positions p - 1 whose logits predict the answer tokens."""
        return self.text_positions[self.answer_positions] - 1

    def with_text(self, kept: torch.Tensor) -> "Encoded":
        """The same with only some of its text tokens.

        kept: [M] ascending indices into the text tokens, all answer tokens among them
        """
        images = tuple(replace(s, text_position=int((kept < s.text_position).sum())) for s in self.images)
        return replace(
            self,
            text_positions=self.text_positions[kept],
            text_ids=self.text_ids[kept],
            in_image=self.in_image[kept],
            answer_positions=torch.searchsorted(kept, self.answer_positions),
            images=images,
        )


class Encoder:
    """Turns samples into token ids with one model's processor.

    image_token_id: that of the model (`config.image_token_id`); the processor's differs in some families
    max_length:     in tokens; longer samples are a SampleError and never cut: image tokens cannot be cut
    clock:          the date that a chat template writes which writes one (see `emkd.clock`)
    """

    def __init__(
        self, processor: Any, image_token_id: int, max_length: int | None = None, clock: str | None = None
    ) -> None:
        self.processor = processor
        self.image_token_id = image_token_id
        self.max_length = max_length
        self.clock = clock
        # Each epoch reads the same rows; rendering a long conversation costs more than tokenizing it.
        self._render = lru_cache(maxsize=16_384)(lambda turns: render(self.processor, turns, self.clock))
        self._process = Process(processor)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Encoder, (self.processor, self.image_token_id, self.max_length, self.clock))

    def __call__(self, sample: Sample) -> Encoded:
        """Encode one sample. Raises SampleError, with the reason, if it cannot be used."""
        _check_answered(sample.turns)
        text, answers = self._render(sample.turns)
        self._check_placeholders(text, len(sample.images))
        images = [decode_image(data) for data in sample.images]
        processed = self._process(text, images)
        inputs, replaced, offsets = processed.inputs, processed.replaced, processed.offsets
        ids = inputs["input_ids"][0]
        if self.max_length is not None and len(ids) > self.max_length:
            raise SampleError("too-long", f"{len(ids)} tokens, --max-length is {self.max_length}")
        vision_mask = ids == self.image_token_id
        text_positions = (~vision_mask).nonzero()[:, 0]
        answer_positions = _answer_positions(text, answers, replaced, offsets, text_positions)
        if len(answer_positions) == 0:
            raise SampleError("no-answer", "the assistant's turns have no tokens")
        if int(text_positions[answer_positions[0]]) == 0:
            raise SampleError("no-prompt", "the answer starts at the first token, which nothing predicts")
        spans = self._image_spans(inputs, images, replaced, offsets, vision_mask)
        return Encoded(
            key=sample.key,
            inputs=inputs,
            vision_mask=vision_mask,
            text_positions=text_positions,
            text_ids=ids[text_positions],
            in_image=self._in_image(text, processed, text_positions, spans),
            answer_positions=answer_positions,
            images=spans,
            image_keys=_image_keys(ids, vision_mask, spans, sample.images),
        )

    def words(self, ids: list[int]) -> str:
        """The text of token ids, with special tokens."""
        return str(self.processor.tokenizer.decode(ids))

    def _check_placeholders(self, text: str, n_images: int) -> None:
        token = self.processor.image_token
        if text.count(token) != n_images:
            raise SampleError(
                "image-placeholders",
                f"the rendered prompt has {text.count(token)} times {token!r} for {n_images} images: "
                "either a text contains the model's own placeholder, or the chat template drops images",
            )

    def _in_image(
        self, text: str, processed: Processed, text_positions: torch.Tensor, spans: Sequence[ImageSpan]
    ) -> torch.Tensor:
        """[L] which text tokens belong to an image: what the template writes for it, what the processor makes of that,
        and white space on either side."""
        offsets, ids = processed.offsets[text_positions], processed.inputs["input_ids"][0, text_positions].tolist()
        found = torch.zeros(len(offsets), dtype=torch.bool)
        before, _, after = self._placeholder.partition(self.processor.image_token)
        for (start, stop), (new_start, new_stop) in processed.replaced:
            left = new_start - len(before) * text[:start].endswith(before)
            right = new_stop + len(after) * text[stop:].startswith(after)
            found |= (offsets[:, 0] >= left) & (offsets[:, 1] <= right) & (offsets[:, 0] < offsets[:, 1])
        for span in spans:
            for positions in (range(span.text_position - 1, -1, -1), range(span.text_position, len(ids))):
                for position in takewhile(lambda n: found[n] or not self.words([ids[n]]).strip(), positions):
                    found[position] = True
        return found

    @cached_property
    def _placeholder(self) -> str:
        """What the chat template writes for an image."""
        return image_text(self.processor) or str(self.processor.image_token)

    def _image_spans(
        self,
        inputs: dict[str, torch.Tensor],
        images: Sequence[Image.Image],
        replaced: list[tuple[Span, Span]],
        offsets: torch.Tensor,
        vision_mask: torch.Tensor,
    ) -> tuple[ImageSpan, ...]:
        spans: list[ImageSpan] = []
        seen = 0
        for number, (image, (_, (start, stop))) in enumerate(zip(images, replaced, strict=True)):
            own = (offsets[:, 0] >= start) & (offsets[:, 1] <= stop) & vision_mask
            count = int(own.sum())
            if count == 0:
                raise SampleError("image-tokens", f"image {number} became no vision token")
            first = int(own.nonzero()[0])
            spans.append(
                ImageSpan(
                    text_position=int((~vision_mask[:first]).sum()),
                    start=seen,
                    count=count,
                    grids=tile_grids(self.processor, inputs, number, count),
                    original_size=(image.height, image.width),
                )
            )
            seen += count
        if seen != int(vision_mask.sum()):
            raise SampleError("image-tokens", f"{int(vision_mask.sum())} vision tokens, {seen} of them in images")
        return tuple(spans)


def _image_keys(
    ids: torch.Tensor, vision_mask: torch.Tensor, spans: Sequence[ImageSpan], images: Sequence[bytes]
) -> tuple[str, ...]:
    hashed, keys = xxhash.xxh3_128(), []
    positions = vision_mask.nonzero()[:, 0].tolist()
    first = 0
    for span, image in zip(spans, images, strict=True):
        end = positions[span.start + span.count - 1] + 1
        hashed.update(ids[first:end].numpy().tobytes())
        hashed.update(len(image).to_bytes(8, "little"))
        hashed.update(image)
        keys.append(hashed.hexdigest())
        first = end
    return tuple(keys)


def _check_answered(turns: Sequence[Turn]) -> None:
    """Raise SampleError without an answer to train on: an empty answer would teach only its end token."""
    if not any(turn.role == "assistant" for turn in turns):
        raise SampleError("no-answer", "the conversation has no assistant turn")
    answers = [turn.parts for turn in turns if turn.is_answer]
    if not answers:
        raise SampleError("no-answer", "none of the assistant's turns is to be learnt (loss, weight or train)")
    if not any(isinstance(part, str) and part.strip() for parts in answers for part in parts):
        raise SampleError("no-answer", "the assistant's turns are empty")


def _answer_positions(
    text: str,
    answers: Sequence[Span],
    replaced: Sequence[tuple[Span, Span]],
    offsets: torch.Tensor,
    text_positions: torch.Tensor,
) -> torch.Tensor:
    """[A] index into the text tokens of each answer token, from the characters of the answers.

    A token may include white space next to an answer ("▁cat"), but no other character.
    """
    starts, stops = offsets[text_positions, 0], offsets[text_positions, 1]
    chosen = torch.zeros(len(text_positions), dtype=torch.bool)
    for first, last in answers:
        shift = _expanded(first, replaced) - first  # there are no images inside answers
        touched = (starts < last + shift) & (stops > first + shift)
        for start, stop in zip((starts[touched] - shift).tolist(), (stops[touched] - shift).tolist(), strict=True):
            if (text[start:first] + text[last:stop]).strip():
                raise SampleError(
                    "template-prefix", f"the token {text[start:stop]!r} belongs to an answer only in part"
                )
        chosen |= touched
    return chosen.nonzero()[:, 0]


def _expanded(character: int, replaced: Sequence[tuple[Span, Span]]) -> int:
    """The index of a character of the rendered text after the processor has expanded the images."""
    shift = 0
    for (_, stop), (_, new_stop) in replaced:
        if stop <= character:
            shift = new_stop - stop
    return character + shift

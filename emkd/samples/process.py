"""A rendered text and its images go through a model's processor.

The processor expands each image placeholder into vision tokens and reports which characters it replaced by which text;
the tokenizer reports the characters of each token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from emkd.errors import ModelError, SampleError
from emkd.samples.render import Span


@dataclass(frozen=True, kw_only=True)
class Processed:
    """What the processor makes of one sample.

    inputs:   the processor's tensors, with a leading batch axis of 1 on token tensors
    replaced: for each image, the characters of its placeholder in the text, and of its replacement in the new text
    offsets:  [T, 2] the characters of each token in the new text
    """

    inputs: dict[str, torch.Tensor]
    replaced: list[tuple[Span, Span]]
    offsets: torch.Tensor


class Process:
    """One model's processor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._rewriting_checked = False

    def __call__(self, text: str, images: Sequence[Image.Image]) -> Processed:
        """Process one sample. Raises SampleError if the processor refuses it, ModelError if it does not report all that
        it replaced."""
        bos = self.processor.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        try:
            features = self.processor(
                text=[text],
                images=list(images) or None,
                return_tensors="pt",
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                add_special_tokens=special,
            )
        except (OSError, MemoryError):  # not the row's fault
            raise
        # Foreign code on foreign images: it has its own limits, and may raise any exception for them (Qwen2-VL: sides
        # of 1 to 200). Nothing is hidden: the reason is recorded, and above --max-skipped the job fails.
        except Exception as error:
            detail = f"the processor refuses this row: {type(error).__name__}: {error!s:.500}"
            raise SampleError("processor-error", detail) from error
        inputs = dict(features)
        offsets = inputs.pop("offset_mapping")[0]
        found = inputs.pop("text_replacement_offsets", None)
        if not images:  # families report in different ways that nothing was replaced
            return Processed(inputs=inputs, replaced=[], offsets=offsets)
        if found is None:
            raise ModelError(
                f"{type(self.processor).__name__} does not report by which text it replaced an image's "
                "placeholder (text_replacement_offsets): it is not supported"
            )
        if not self._rewriting_checked:
            expected = self.processor.tokenizer(_replaced(text, found[0]), add_special_tokens=special)["input_ids"]
            self._check_not_rewritten(expected, inputs["input_ids"][0].tolist())
            self._rewriting_checked = True
        replaced = [(entry["span"], entry["new_span"]) for entry in found[0]]
        return Processed(inputs=inputs, replaced=replaced, offsets=offsets)

    def _check_not_rewritten(self, expected: list[int], found: list[int]) -> None:
        """Check on the first row with images that the processor changes nothing else.

        Answers are found by the positions of their characters, which would differ in a changed text.
        """
        if found == expected:
            return
        pairs = zip(found, expected, strict=False)
        first = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
        theirs, ours = (self.processor.tokenizer.decode(ids[first : first + 5]) for ids in (found, expected))
        raise ModelError(
            f"{type(self.processor).__name__} changes more of a text than its image placeholders: {len(found)} "
            f"tokens, expected {len(expected)} from the chat template; from token {first} on {theirs!r}, expected "
            f"{ours!r}. Answers cannot be found in such a text: this family is not supported"
        )


def _replaced(text: str, entries: Sequence[dict[str, Any]]) -> str:
    """The text with the replacements that the processor reports."""
    parts, seen = [], 0
    for entry in entries:
        start, stop = entry["span"]
        parts += [text[seen:start], entry["replacement"]]
        seen = stop
    return "".join([*parts, text[seen:]])

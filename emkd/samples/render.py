"""A conversation as the text that a model reads, and which of its characters are answers.

The chat template decides the text. If it marks what the assistant says (`{% generation %}`, as LLaVA's do), the marked
text is the answer. If it does not (most templates), an answer is what an assistant turn adds to the prompt that asks
for it. Nothing asks for the first turn of a conversation: if that is the assistant's, its answer is what follows the
text that the template writes before any answer. An end token that follows directly belongs to the answer; white space
around the answer does not. Turns of the assistant that are not to be learnt (`Turn.learnt`) are no answers.
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from emkd.clock import ANY_DAY, reads_clock, with_clock
from emkd.errors import ModelError, SampleError
from emkd.samples.sample import Turn

Span = tuple[int, int]

# A template without marks is rendered twice for each answer, which grows with the square of the turns: a thousand take
# seconds, ten thousand many minutes.
MAX_TURNS = 1000

# Answers of which no two begin in the same way, and neither with white space.
_FIRST_WORDS = ("Xq7", "9wv")

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(processor: Any, turns: Sequence[Turn], clock: str | None = None) -> tuple[str, tuple[Span, ...]]:
    """(text, characters [first, last) of each answer)

    clock: the date that a template writes which writes one (see `emkd.clock`)

    Raises SampleError: template-error if the template refuses the conversation (for instance roles that do not
    alternate), template-prefix if a template without marks renders earlier turns differently once later ones follow,
    too-long if such a template would take minutes. Raises ModelError if the template writes the date and none is given.
    """
    template = _pinned(processor, clock)
    find = _marked if GENERATION_MARK.search(template or "") else _by_prefixes
    try:
        text, spans = find(processor, template, turns)
    except (SampleError, MemoryError):
        raise
    # A template is a program of the checkpoint's author that runs on the row's content: it may raise anything. If it
    # fails on every row, each row is recorded with this reason, and the job fails above --max-skipped.
    except Exception as error:
        detail = f"the chat template refuses this conversation: {error!s:.500}"
        raise SampleError("template-error", detail) from error
    return text, tuple(_trimmed(text, span) for span in spans)


def template_of(processor: Any) -> str | None:
    """The template that renders conversations: the default one if a checkpoint names several, None if it has none."""
    template = getattr(processor, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _pinned(processor: Any, clock: str | None) -> str | None:
    """The template that renders conversations, with the date in it."""
    template = template_of(processor)
    if template is None or not reads_clock(template):
        return template
    if clock is None:
        raise ModelError(
            "the chat template writes today's date (strftime_now), and no date is given: the same row would have "
            "another text tomorrow"
        )
    return with_clock(template, clock)


def end_token(processor: Any) -> str | None:
    """The special token at the end of answers, or None: then a student is not trained to stop."""
    turns = [Turn(role="user", parts=("a",)), Turn(role="assistant", parts=("b",))]
    text, ((first, last),) = render(processor, turns, ANY_DAY)
    found = [token for token in processor.tokenizer.all_special_tokens if text[first:last].endswith(token)]
    return max(found, key=len, default=None)


def _marked(processor: Any, template: str | None, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
    """(text, answers) by the template's marks. Adjacent marks (one per part of a turn) are one answer."""
    messages = [turn.as_message() for turn in turns]
    text, marks = _rendered_with_marks(processor, template, messages)
    spans: list[Span] = []
    for first, last in marks:
        if spans and spans[-1][1] == first:
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
    spans = [(first, last + _following_end(processor, text[last:])) for first, last in spans]
    for number, turn in enumerate(turns):
        if turn.role == "assistant" and not turn.learnt:
            spans = [
                part
                for span in spans
                for part in _without(span, _turn_span(processor, template, messages, number, text))
            ]
    return text, spans


def _rendered_with_marks(
    processor: Any, template: str | None, messages: list[dict[str, Any]]
) -> tuple[str, list[Span]]:
    found: Any = render_jinja_template(
        [messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    (text,), (marks,) = found
    return text, marks


def _turn_span(processor: Any, template: str | None, messages: list[dict[str, Any]], number: int, text: str) -> Span:
    """The characters that one turn adds to the text of those before it."""
    before = _rendered_with_marks(processor, template, messages[:number])[0] if number else ""
    upto = _rendered_with_marks(processor, template, messages[: number + 1])[0]
    if not (upto.startswith(before) and text.startswith(upto)):
        raise SampleError("template-prefix", f"the template renders turn {number} differently in its context")
    return len(before), len(upto)


def _without(span: Span, cut: Span) -> list[Span]:
    """What is left of a span without the characters of another."""
    parts = ((span[0], min(span[1], cut[0])), (max(span[0], cut[1]), span[1]))
    return [(first, last) for first, last in parts if first < last]


def _following_end(processor: Any, rest: str) -> int:
    """The length of the end token that follows directly, or 0."""
    tokens = [token for token in processor.tokenizer.all_special_tokens if rest.startswith(token)]
    return max(map(len, tokens), default=0)


def _by_prefixes(processor: Any, template: str | None, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
    messages = [turn.as_message() for turn in turns]
    if len(messages) > MAX_TURNS:
        raise SampleError("too-long", f"{len(messages)} turns, at most {MAX_TURNS} without generation marks")

    def written(some: list[dict[str, Any]], ask: bool = False) -> str:
        asked = {"tokenize": False, "add_generation_prompt": ask}
        return str(processor.apply_chat_template(some, chat_template=template, **asked))

    def rendered(n: int, ask: bool = False) -> str:
        return written(messages[:n], ask)

    def header() -> str:
        others = [written([{**messages[0], "content": [{"type": "text", "text": word}]}]) for word in _FIRST_WORDS]
        return _common_start([rendered(1), *others])

    text = rendered(len(messages))
    spans = []
    for number, turn in enumerate(turns):
        if not turn.is_answer:
            continue
        prompt, upto = rendered(number, ask=True) if number else header(), rendered(number + 1)
        if not (upto.startswith(prompt) and text.startswith(upto)):
            raise SampleError("template-prefix", f"the template renders turn {number} differently in its context")
        spans.append((len(prompt), len(upto)))
    return text, spans


def _common_start(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    least, most = min(texts), max(texts)
    return least[: n_in_common(least, most)]


def n_in_common(one: str, other: str) -> int:
    """Length of the common prefix."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _trimmed(text: str, span: Span) -> Span:
    """The span without white space at either end, such as a newline that the template writes after its end token."""
    first, last = span
    answer = text[first:last]
    return last - len(answer.lstrip()), first + len(answer.rstrip())

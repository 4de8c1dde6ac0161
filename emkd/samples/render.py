"""A conversation as the text that a model reads, and which of its characters are answers.

The chat template decides the text. Where it marks what the assistant says (`{% generation %}`, as LLaVA's do), the
marks are the answers; where it does not (most templates), an answer is what an assistant turn adds to the prompt
that asks for it. An end token that follows directly belongs to the answer, white space around it to nobody.
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from emkd.errors import SampleError
from emkd.samples.sample import Turn

Span = tuple[int, int]

# A template without marks is rendered twice for each answer, which grows with the square of the turns: a thousand take
# seconds, ten thousand many minutes.
MAX_TURNS = 1000

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(processor: Any, turns: Sequence[Turn]) -> tuple[str, tuple[Span, ...]]:
    """(text, characters of each answer: [first, last)). Raises SampleError: template-error where the template refuses
    the conversation (roles that do not alternate, say), template-prefix where a template without marks writes earlier
    turns differently once later ones follow, too-long where such a template would take minutes."""
    messages = [turn.as_message() for turn in turns]
    find = _marked if GENERATION_MARK.search(template_of(processor) or "") else _by_prefixes
    try:
        text, spans = find(processor, messages)
    except (SampleError, MemoryError):
        raise
    # A template is a program of the checkpoint's author, run on what the row says: it may raise anything. Where it
    # fails on every row, each is recorded with this reason, and the job fails above --max-skipped.
    except Exception as error:
        detail = f"the chat template does not take this conversation: {error!s:.500}"
        raise SampleError("template-error", detail) from error
    return text, tuple(_trimmed(text, span) for span in spans)


def template_of(processor: Any) -> str | None:
    """The template that conversations are rendered with: of several that a checkpoint names, the default one."""
    template = getattr(processor, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def end_token(processor: Any) -> str | None:
    """The special token that answers end in; without one (None) a student does not learn where to stop."""
    turns = [Turn(role="user", parts=("a",)), Turn(role="assistant", parts=("b",))]
    text, ((first, last),) = render(processor, turns)
    found = [token for token in processor.tokenizer.all_special_tokens if text[first:last].endswith(token)]
    return max(found, key=len, default=None)


def _marked(processor: Any, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
    """Neighbouring marks (one for each part of a turn) are one answer."""
    found: Any = render_jinja_template(
        [messages],
        chat_template=template_of(processor),
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    (text,), (marks,) = found
    spans: list[Span] = []
    for first, last in marks:
        if spans and spans[-1][1] == first:
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
    return text, [(first, last + _following_end(processor, text[last:])) for first, last in spans]


def _following_end(processor: Any, rest: str) -> int:
    """Characters of the end token that follows directly, 0 where none does."""
    tokens = [token for token in processor.tokenizer.all_special_tokens if rest.startswith(token)]
    return max(map(len, tokens), default=0)


def _by_prefixes(processor: Any, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
    if len(messages) > MAX_TURNS:
        raise SampleError("too-long", f"{len(messages)} turns, at most {MAX_TURNS} without generation marks")

    def rendered(n: int, ask: bool = False) -> str:
        return str(processor.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=ask))

    text = rendered(len(messages))
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, upto = rendered(number, ask=True) if number else "", rendered(number + 1)
        if not (upto.startswith(prompt) and text.startswith(upto)):
            raise SampleError("template-prefix", f"the template renders turn {number} differently in its context")
        spans.append((len(prompt), len(upto)))
    return text, spans


def _trimmed(text: str, span: Span) -> Span:
    """Without white space at either end; that of a template that writes a newline behind its end token included."""
    first, last = span
    answer = text[first:last]
    return last - len(answer.lstrip()), first + len(answer.rstrip())

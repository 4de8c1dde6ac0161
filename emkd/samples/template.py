"""What a chat template writes for an image."""

from typing import Any

from emkd.clock import ANY_DAY
from emkd.errors import SampleError
from emkd.samples.render import n_in_common, render
from emkd.samples.sample import ImagePart, Part, Turn

# A word that no template contains.
_WORD = "Xq7"
_SYSTEM = Turn(role="system", parts=("s",))


def image_text(processor: Any) -> str | None:
    """Return what the chat template writes for an image, such as "<|vision_start|><|image_pad|><|vision_end|>".

    "" if it writes nothing; None if it takes no question about an image, neither alone nor after a system turn.
    """
    for before in ((), (_SYSTEM,)):
        try:
            (without, _), (text, _) = (
                render(processor, (*before, *_question(parts)), ANY_DAY) for parts in ((_WORD,), (ImagePart(), _WORD))
            )
        except SampleError:
            continue
        first = n_in_common(text, without)
        last = n_in_common(text[first:][::-1], without[first:][::-1])
        return text[first : len(text) - last].strip()
    return None


def _question(parts: tuple[Part, ...]) -> tuple[Turn, ...]:
    return (Turn(role="user", parts=parts), Turn(role="assistant", parts=("b",)))

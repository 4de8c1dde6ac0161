"""Whether two tokenizers read text the same way: what their ids mean, and how they cut text into tokens."""

import json

from tokenizers import Tokenizer

from emkd.errors import TokenizerMismatchError

SHOWN = 5  # ids that a message lists
PARTS = ("normalizer", "pre_tokenizer")


def vocabulary_conflicts(teacher: Tokenizer, reader: Tokenizer, name: str = "student") -> list[str]:
    """Describe every id that both tokenizers have and that means different tokens, in ascending order."""
    common = sorted(set(teacher.get_vocab().values()) & set(reader.get_vocab().values()))  # ids may have gaps
    pairs = ((token, teacher.id_to_token(token), reader.id_to_token(token)) for token in common)
    return [f"id {token}: teacher {theirs!r}, {name} {own!r}" for token, theirs, own in pairs if theirs != own]


def check_shared_tokenizer(teacher_json: bytes, reader_json: bytes, name: str = "student") -> None:
    """Check that both tokenizers read text the same way. Raises TokenizerMismatchError.

    An id that only one side has is no conflict. The meaning of a shared id, the normalizer and the pre-tokenizer must
    be equal. Merges are not compared: each row's token ids are compared when the row is read.

    name: what messages call the model that reads the cache
    """
    conflicts = vocabulary_conflicts(_tokenizer(teacher_json), _tokenizer(reader_json), name)
    if conflicts:
        more = f"; {len(conflicts) - SHOWN} more" if len(conflicts) > SHOWN else ""
        raise TokenizerMismatchError(
            f"the {name}'s tokenizer is not the teacher's: {len(conflicts)} ids that both have mean different tokens "
            f"({'; '.join(conflicts[:SHOWN])}{more}). A cache can only be used with its teacher's tokenizer"
        )
    teacher, reader = json.loads(teacher_json), json.loads(reader_json)
    for part in PARTS:
        if teacher.get(part) != reader.get(part):
            raise TokenizerMismatchError(
                f"the {name}'s tokenizer has a different {part} from the teacher's: the same text would "
                f"become different tokens. Teacher: {json.dumps(teacher.get(part)):.160}; "
                f"{name}: {json.dumps(reader.get(part)):.160}"
            )


def check_same_ids(teacher_json: bytes, reader_json: bytes, name: str) -> None:
    """Check that neither tokenizer has an id that the other lacks. Raises TokenizerMismatchError."""
    lacking, extra = lacking_ids(teacher_json, reader_json), lacking_ids(reader_json, teacher_json)
    if lacking or extra:
        raise TokenizerMismatchError(
            f"the {name}'s tokenizer is not the teacher's: it lacks {len(lacking)} of the teacher's ids"
            f"{_listed(lacking)}, and has {len(extra)} that the teacher's lacks{_listed(extra)}"
        )


def lacking_ids(teacher_json: bytes, reader_json: bytes) -> dict[int, str]:
    """Return the ids of the teacher's tokenizer that the reader's lacks, ascending, with their tokens."""
    teacher, reader = (_tokenizer(data).get_vocab() for data in (teacher_json, reader_json))
    known = set(reader.values())
    return {number: token for token, number in sorted(teacher.items(), key=lambda item: item[1]) if number not in known}


def describe_lacking(lacking: dict[int, str], name: str = "student") -> str:
    """Return the line for the log about ids that the student lacks."""
    return (
        f"the {name}'s tokenizer lacks {len(lacking)} of the teacher's ids: {_some(lacking)}. Rows with one of them in "
        "their text cannot be used; among logits they count as the tail (lacking_mass in the log)"
    )


def _listed(ids: dict[int, str]) -> str:
    return f" ({_some(ids)})" if ids else ""


def _some(ids: dict[int, str], n: int = 4) -> str:
    shown = ", ".join(f"{token!r} ({number})" for number, token in list(ids.items())[:n])
    return shown + (", ..." if len(ids) > n else "")


def _tokenizer(data: bytes) -> Tokenizer:
    return Tokenizer.from_buffer(data)  # type: ignore[arg-type, unused-ignore]

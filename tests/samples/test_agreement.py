"""What is said where student and teacher read a row differently."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from emkd.errors import TokenizerMismatchError
from emkd.samples import Dataset
from emkd.samples.agreement import check_same_text
from emkd.samples.encode import Encoder
from tests import tiny


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tiny.new_processor(), tiny.SPECIALS.index("<image>"))


def reading(encoder: Encoder, text: str) -> SimpleNamespace:
    ids = encoder.processor.tokenizer(text)["input_ids"]
    return SimpleNamespace(text_ids=torch.tensor(ids), answer_positions=torch.tensor([1]), images=())


def refused(encoder: Encoder, student: str, teacher: str, **chosen) -> str:
    with pytest.raises(TokenizerMismatchError) as error:
        check_same_text(reading(encoder, student), reading(encoder, teacher), 17, **chosen)
    return str(error.value)


def test_the_first_token_that_differs_is_shown_in_words(encoder):
    text = "user: what is in this picture and that one"
    assert refused(encoder, f"{text} assistant: cat", f"{text} user: cat", words=encoder.words) == (
        "row 17: the student's text is 11 tokens and the teacher's 11; they differ first at text token 9: student "
        "'assistant:' (id 5), teacher 'user:' (id 4), after '... what is in this picture and that one'. Both need the "
        "same tokenizer and chat template"
    )
    assert "student '<end>' (id 3), teacher nothing, after 'what is'." in refused(
        encoder, "what is <end>", "what is", words=encoder.words
    )
    assert "token 0: student 'cat' (id 19), teacher 'dog' (id 20). Both" in refused(
        encoder, "cat", "dog", words=encoder.words
    )


def test_without_words_ids_are_shown(encoder):
    assert "at text token 1: student id 19, teacher id 20. Both" in refused(encoder, "user: cat", "user: dog")


def test_words_are_asked_for_only_where_something_differs(encoder, tmp_path):
    def never(ids: list[int]) -> str:
        raise AssertionError("slow, and for nothing")

    encoded = encoder(Dataset(str(tiny.write_data(tmp_path / "rows.parquet"))).sample(0))
    check_same_text(encoded, encoded, 0, words=never)
    other = replace(encoded, answer_positions=encoded.answer_positions[1:])
    with pytest.raises(TokenizerMismatchError, match="tokens are answers for the student and"):
        check_same_text(other, encoded, 0, words=never)

"""The messages about rows that student and teacher read differently."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from emkd.agreement.text import SharedText, check_same_text, shared_text
from emkd.errors import TokenizerMismatchError
from emkd.samples import Dataset
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
        "row 17: the student's text has 11 tokens and the teacher's 11; they differ first at text token 9: student "
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
    with pytest.raises(TokenizerMismatchError, match=r"the answer tokens differ \(\d+ of the student, "):
        check_same_text(other, encoded, 0, words=never)


def written(own: str, theirs: str, other_family: bool = True, answer: int = -1) -> SharedText | None:
    """Both read this, in words; [..] encloses what a family writes for an image, with | for the image itself. The
    answer is the last word, or for the teacher the word at index `answer`."""
    sides = []
    for text, place in ((own, -1), (theirs, answer)):
        words = text.replace("[", " [ ").replace("]", " ] ").replace("|", " | ").split()
        ids, in_image, images, inside = [], [], [], False
        for word in words:
            if word in "[]":
                inside = word == "["
            elif word == "|":
                images.append(SimpleNamespace(text_position=len(ids)))
            else:
                ids.append(sum(map(ord, word)))
                in_image.append(inside)
        sides.append(
            SimpleNamespace(
                text_ids=torch.tensor(ids),
                in_image=torch.tensor(in_image),
                images=images,
                answer_positions=torch.tensor([len(ids) + place]),
            )
        )
    return shared_text(*sides, 3, other_family=other_family)


@pytest.mark.parametrize(
    ("own", "theirs", "kept"),
    [
        ("a [|] b c", "a [|] b c", None),
        ("a [<|>] b c", "a [<|>] b c", None),
        ("a [|] b c", "a [<|>] b c", ([0, 1, 2], [0, 3, 4])),
        ("a [<|>] b c", "a [|] b c", ([0, 3, 4], [0, 1, 2])),
        ("a [<|>] b [<|>] c", "a [x|y z] b [x|y z] c", ([0, 3, 6], [0, 4, 8])),
        ("[|] b c", "[<|>] b c", ([0, 1], [2, 3])),
        ("a [|][|] c", "a [<|>][<|>] c", ([0, 1], [0, 5])),
    ],
)
def test_what_stands_for_an_image_is_left_out_where_it_differs(own, theirs, kept):
    found = written(own, theirs)
    assert (found if found is None else (found.own.tolist(), found.theirs.tolist())) == kept


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        ("a [|] b c", "x [<|>] b c"),  # another word
        ("a [|] b c", "a [<|>] b d c"),  # one that only the teacher reads, not beside an image
        ("a d [|] c", "a [<|>] c"),  # one that only the student reads
        ("a [|] c", "a [<|>] b [<|>] c"),  # another image
        ("a [|] b [|] c", "a [<|>] b b [<|>] c"),  # no telling which of the two it is
        ("a [|] c", "x a [<|>] c"),  # more at the very beginning, where no image is beside it
        ("a [|] c", "a [<|>] c x"),  # more at the very end
        ("a b", "a b c"),  # no image at all
    ],
)
def test_any_other_difference_is_refused(own, theirs):
    with pytest.raises(TokenizerMismatchError, match="row 3: "):
        written(own, theirs)


def test_models_of_one_family_write_the_same():
    """A token next to an image that only one of them reads means another template, not another way to write images."""
    assert written("a [|] b", "a [|] b", other_family=False) is None
    with pytest.raises(TokenizerMismatchError, match="they differ first at text token 1"):
        written("a [|] b", "a [|] n b", other_family=False)


def test_what_differs_is_shown_and_not_what_may_differ():
    with pytest.raises(TokenizerMismatchError) as raised:
        written("a [1 | 2] b c [|] d", "a [3 | 4] b e [|] d")
    message = str(raised.value)
    assert "row 3: between images 1 and 2 the student reads" in message
    assert "they differ in more than what their families write around and within images" in message


def test_other_answers_are_refused_where_images_are_written_otherwise():
    assert written("a [|] b c", "a [<|>] b c") is not None
    with pytest.raises(TokenizerMismatchError, match="row 3: the answer tokens of student and teacher differ"):
        written("a [|] b c", "a [<|>] b c", answer=-2)

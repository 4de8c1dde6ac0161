import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from emkd.agreement.tokenizer import check_shared_tokenizer
from emkd.errors import TokenizerMismatchError
from emkd.vlm.identity import tokenizer_json
from tests import tiny


def saved(tmp_path, words=tiny.VOCABULARY) -> bytes:
    tiny.new_processor(words).save_pretrained(tmp_path)
    return tokenizer_json(tmp_path)


def test_the_same_and_longer_or_shorter_vocabularies_are_shared(tmp_path):
    teacher = saved(tmp_path / "a")
    check_shared_tokenizer(teacher, saved(tmp_path / "b"))
    check_shared_tokenizer(teacher, saved(tmp_path / "c", (*tiny.VOCABULARY, "more")))
    check_shared_tokenizer(teacher, saved(tmp_path / "d", tiny.VOCABULARY[:-3]))


def test_an_id_with_another_meaning_is_refused(tmp_path):
    words = list(tiny.VOCABULARY)
    words[10], words[11] = words[11], words[10]
    with pytest.raises(TokenizerMismatchError, match=r"id 10: teacher 'picture', student 'and'; id 11"):
        check_shared_tokenizer(saved(tmp_path / "a"), saved(tmp_path / "b", words))


def test_an_id_after_a_gap_is_compared_too():
    def tokenizer(words: dict[str, int]) -> bytes:
        return Tokenizer(WordLevel(words, unk_token="a")).to_str().encode()

    teacher = tokenizer({"a": 0, "b": 1, "c": 5})
    check_shared_tokenizer(teacher, tokenizer({"a": 0, "b": 1, "d": 4}))
    with pytest.raises(TokenizerMismatchError, match=r"1 ids .*id 5: teacher 'c', student 'd'"):
        check_shared_tokenizer(teacher, tokenizer({"a": 0, "b": 1, "d": 5}))


def test_another_way_to_cut_text_is_refused(tmp_path):
    teacher = saved(tmp_path / "a")
    student = teacher.replace(b'"WhitespaceSplit"', b'"Whitespace"')
    assert student != teacher
    with pytest.raises(TokenizerMismatchError, match="a different pre_tokenizer"):
        check_shared_tokenizer(teacher, student)

"""Words and tokens: where a word is, and which of two prompts' tokens are one."""

import pytest
import torch

from masafusion_lab import InputError, words
from tests.tiny import tiny_tokenizer

N = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize(
    ("text", "word", "places"),
    [
        ("a cat on grass", "cat", [2]),
        ("a cat, on grass", "cat", [2]),  # punctuation is glued to it
        ("A CAT on grass", "cat", [2]),
        ("a horse on grass", "horse", [2, 3, 4, 5]),  # h-or-s-e
        ("a cat and a cat", "cat", [2, 5]),
        ("a red cat on grass", "red cat", [2, 3]),
    ],
)
def test_a_word_is_all_of_its_tokens_wherever_it_stands(tokenizer, text, word, places):
    assert words.places(tokenizer, text, word, N) == places


@pytest.mark.parametrize("word", ["hat", "ca", "", " ", "a  cat", ".*"])
def test_what_is_no_word_of_the_prompt_is_an_error(tokenizer, word):
    with pytest.raises(InputError, match="is no word of 'a cat on grass'"):
        words.places(tokenizer, "a cat on grass", word, N)


def test_a_word_that_is_not_read_is_an_error_and_one_half_read_is_half(tokenizer):
    long = "a red cat " * 7  # 21 tokens of 22
    assert words.places(tokenizer, long + "horse", "horse", N) == [22]
    with pytest.raises(InputError, match=r"'snow' .* lies beyond the 22 tokens"):
        words.places(tokenizer, long + "horse snow", "snow", N)


@pytest.mark.parametrize(
    ("source", "target", "same"),
    [
        ("abcz", "abcz", [0, 1, 2, 3]),
        ("abz", "axbz", [0, None, 1, 2]),
        ("axbz", "abz", [0, 2, 3]),
        ("abz", "xyz", [None, None, 2]),
        ("aaz", "az", [0, 2]),  # of equal alignments the one of the published code
        ("az", "aaz", [0, None, 1]),
        ("z", "z", [0]),
        ("", "ab", [None, None]),
    ],
)
def test_as_many_tokens_as_can_be_are_the_same_in_order(source, target, same):
    assert words.align(list(map(ord, source)), list(map(ord, target))) == same


@pytest.mark.parametrize("of", [words.refinement, words.replacement])
@pytest.mark.parametrize("as_published", [False, True])
def test_equal_prompts_are_the_same_token_by_token(tokenizer, of, as_published):
    M, own = of(tokenizer, "a horse on grass", "a horse on grass", N, as_published=as_published)
    assert torch.equal(M, torch.eye(N))
    assert not own.any()


PAIRS = [
    ("a cat on grass", "a red cat on grass"),
    ("a red cat on grass", "a cat"),
    ("a cat on grass", "a horse on grass"),
    ("a horse in snow", "a cat in snow"),
    ("", "a cat"),
    ("a cat", ""),
    ("a red cat " * 9, "a blue cat " * 9),
    ("a red cat " * 9, "a cat"),
    ("a cat", "a horse " * 9),
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_token_of_the_target_is_one_of_the_sources_or_new(tokenizer, source, target):
    M, own = words.refinement(tokenizer, source, target, N)
    assert torch.equal(M.sum(0) + own, torch.ones(N))
    end = len(words.ids(tokenizer, source, N)) - 1
    padding = len(words.ids(tokenizer, target, N))
    assert M[:end, padding:].sum() == 0  # padding is never a word of the source


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if len(pair[0].split()) == len(pair[1].split())])
def test_replacement_moves_all_of_a_words_attention(tokenizer, source, target):
    M, own = words.replacement(tokenizer, source, target, N)
    end = len(words.ids(tokenizer, source, N))
    torch.testing.assert_close(M[: end - 1].sum(1), torch.ones(end - 1))
    assert not own.any()


def test_the_end_of_a_prompt_that_is_cut_off_replaces_the_end(tokenizer):
    """a horse, h-or-s-e, in place of a cat, seven times: 35 tokens of 22."""
    M, _ = words.replacement(tokenizer, "a cat " * 7, "a horse " * 7, N)
    assert M[:, N - 1].nonzero().flatten().tolist() == [len(words.ids(tokenizer, "a cat " * 7, N)) - 1]


def test_a_token_is_only_the_one_at_its_place_if_asked(tokenizer):
    M, own = words.refinement(tokenizer, "a red cat on grass", "a cat red on grass", N, by_place=True)
    assert own.nonzero().flatten().tolist() == [2, 3]
    assert M.diagonal()[[0, 1, 4, 5, 6]].eq(1).all()
    with pytest.raises(InputError, match="has 2 tokens and 'a horse' 5"):
        words.refinement(tokenizer, "a cat", "a horse", N, by_place=True)


def test_words_of_another_number_cannot_replace(tokenizer):
    with pytest.raises(InputError, match=r"4 words \('a cat on grass'\) and 5 words .*; take refine"):
        words.replacement(tokenizer, "a cat on grass", "a red cat on grass", N)

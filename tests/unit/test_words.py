"""Words of any script."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from selma_ray.words import count_words, has_letter_or_digit, normal_form, tokens_of

LATIN = st.text(
    st.characters(max_codepoint=0x24F, exclude_categories=["Cc", "Cs"], exclude_characters="µ")
    | st.sampled_from("“”‘’—…×½²\u0301\u200b🐈")
)  # µ is Greek


@given(LATIN)
def test_latin_text_has_the_tokens_of_rouge_score(text: str) -> None:
    assert tokens_of(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


@pytest.mark.parametrize(
    ("text", "tokens", "words"),
    [
        ("3 кота на столе", ["3", "кота", "на", "столе"], 4),
        ("Τρεις γάτες", ["τρεις", "γάτες"], 2),
        ("قطة ٣ على السرير", ["قطة", "٣", "على", "السرير"], 4),
        ("दो बिल्लियाँ", ["दो", "बिल्लियाँ"], 2),
        ("고양이 세 마리", ["고양이", "세", "마리"], 3),
        ("一只猫，坐在垫子上。", list("一只猫坐在垫子上"), 8),
        ("ケーキを食べる", list("ケーキを食べる"), 7),
        ("ｹｰｷ", list("ケーキ"), 3),
        ("一只cat和2只dog", ["一", "只", "cat", "和", "2", "只", "dog"], 5),
        ("แมวนั่ง", ["แ", "ม", "ว", "นั่", "ง"], 2),
        ("a café — 3.5 écru", ["a", "caf", "3", "5", "cru"], 5),
        ("a\u200bcat", ["a", "cat"], 2),
        ("", [], 0),
    ],
)
def test_words_of_every_script(text: str, tokens: list[str], words: int) -> None:
    assert tokens_of(text) == tokens
    assert count_words(text) == words


@given(st.text(st.characters(max_codepoint=0x24F, exclude_categories=["Cc", "Cs"])))
def test_words_of_latin_text_stand_between_white_space(text: str) -> None:
    assert count_words(text) == len(text.split())


@given(st.text("ab Çé3кот一猫ケ.,!。", min_size=1), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_copies_of_a_text_share_their_normal_form(text: str, form: str) -> None:
    copies = (
        unicodedata.normalize(form, text),  # type: ignore[arg-type]
        text.swapcase(),
        f" {text.replace(' ', '   ')}\u200b",
        "\u2060".join(text),
    )
    assert {normal_form(copy) for copy in copies} == {normal_form(text)}


def test_normal_form_keeps_what_is_said() -> None:
    assert normal_form("一只猫坐着") == normal_form("一只猫坐着。") != normal_form("一只狗坐着")
    assert normal_form("été") != normal_form("t")
    assert normal_form("ＡＢＣ １２") == "abc 12"
    assert normal_form("A boat!") == "a boat"
    assert normal_form("🐈") != normal_form("🐕")


def test_a_letter_or_digit_of_any_script_says_something() -> None:
    assert all(map(has_letter_or_digit, ["a", "ж", "猫", "7", "٣", "½", "ก"]))
    assert not any(map(has_letter_or_digit, ["", "—", "...", '""', "🐈", " \u200b", "***", "¿?"]))

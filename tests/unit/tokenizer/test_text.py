import pytest

from megatron.tokenizer.text import valid_unicode


@pytest.mark.parametrize("text", ["", "plain", "é漢字🤖", "\x00\ufeff\uffff\U0010ffff"])
def test_valid_text_is_left_alone(text: str) -> None:
    assert valid_unicode(text) is text


def test_surrogate_pairs_are_joined_and_lone_ones_replaced() -> None:
    assert valid_unicode("é\ud83e\udd16") == "é🤖"
    assert valid_unicode("\ud800 \udfff\ud83e") == "\ufffd \ufffd\ufffd"

"""Numbers of tokens as people write them."""

import pytest

from megatron.core.token_count import LARGEST, format_token_count, parse_token_count


@pytest.mark.parametrize(
    "text, count",
    [
        ("131072", 131072),
        ("131,072", 131072),
        ("131_072", 131072),
        ("128K", 131072),
        ("128k", 131072),
        ("1M", 1048576),
        ("1,048,576", 1048576),
        ("1.5M", 1572864),
        ("0.5K", 512),
        ("1,024K", 1048576),
        ("1e6", 1000000),
        ("1.5e+3", 1500),
        (" 4M ", 4194304),
        ("0", 0),
        ("-5", -5),
        ("9007199254740993", 9007199254740993),
        (str(LARGEST), LARGEST),
    ],
)
def test_each_form_is_read(text, count):
    assert parse_token_count(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "K",
        "1.5",
        "128.000",
        "many",
        "128 K",
        "128KB",
        "1G",
        "1,5M",
        "1,04",
        "13_1072",
        "1_024,576",
        "inf",
        "1e-3",
        "1e6K",
        "٣",
    ],
)
def test_another_form_is_refused(text):
    with pytest.raises(ValueError, match="is not a number of tokens; give one, such as 131072, 128K or 1M") as caught:
        parse_token_count(text)
    assert str(caught.value).startswith(repr(text))


@pytest.mark.parametrize("text, words", [("0.3K", "it is 307.2"), ("1.0001M", "1048680.8576")])
def test_a_fraction_of_a_token_is_refused(text, words):
    with pytest.raises(ValueError, match="is not a whole number of tokens") as caught:
        parse_token_count(text)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", [str(LARGEST + 1), "1e400", "9" * 400, f"{LARGEST}K"])
def test_a_count_past_64_bits_is_refused(text):
    with pytest.raises(ValueError, match=f"is too large; give at most {LARGEST} tokens"):
        parse_token_count(text)


@pytest.mark.parametrize(
    "count, text", [(131072, "128K"), (2**20, "1M"), (3 * 2**19, "1536K"), (1000, "1000"), (0, "0"), (2**32, "4096M")]
)
def test_the_shortest_exact_form_is_written_and_read_back(count, text):
    assert format_token_count(count) == text
    assert parse_token_count(text) == count

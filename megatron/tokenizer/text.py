"""Text as tokenizers accept it, and the fastest way through the tokenizers library."""

import tokenizers


def valid_unicode(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates, which JSON can spell and UTF-8 cannot, as U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def encode_text(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of a text without special tokens around it; the offsets of tokens, a quarter of the work, are left out."""
    (encoding,) = tokenizer.encode_batch_fast([valid_unicode(text)], add_special_tokens=False)
    ids: list[int] = encoding.ids
    return ids

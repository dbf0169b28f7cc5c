"""Valid Unicode for tokenizers, and the fastest call into the tokenizers library."""

import tokenizers


def valid_unicode(text: str) -> str:
    """Join surrogate pairs, and replace lone surrogates, which JSON can spell and UTF-8 cannot, by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def encode_text(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Encode a text without special tokens around it; skips token offsets, which are a quarter of the work."""
    (encoding,) = tokenizer.encode_batch_fast([valid_unicode(text)], add_special_tokens=False)
    ids: list[int] = encoding.ids
    return ids

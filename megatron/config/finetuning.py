"""Settings for turning conversations into samples."""

from dataclasses import dataclass
from typing import Literal

LongSamples = Literal["error", "truncate", "skip"]
RewrittenAnswers = Literal["split", "skip", "error"]
RefusedConversations = Literal["error", "skip"]
ChatFormat = Literal[
    "messages", "sharegpt", "contents", "prompt_completion", "alpaca", "dolly", "question_answer", "segments", "tokens"
]


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig:
    """Fine-tuning (finetune_llama.py)."""

    chat_template: str | None = None
    """File with the Jinja template that turns a conversation into text. Default: the tokenizer's own, else a plain
    one."""

    chat_format: ChatFormat | None = None
    """Format of the conversations: messages (of OpenAI or Anthropic), sharegpt, contents (of Gemini),
    prompt_completion, alpaca, dolly, question_answer, segments of text, or tokens. Default: detected by the keys of
    each record."""

    rewritten_answers: RewrittenAnswers = "split"
    """Handling of an answer that the chat template writes differently once turns follow, such as without its
    reasoning: train it in a sample of its own, with the text that the model really sees (split), leave it out of the
    loss (skip), or refuse the conversation (error)."""

    refused_conversations: RefusedConversations = "error"
    """Handling of a conversation that is malformed or cannot be trained exactly: refuse the run (error), or leave it
    out and report how many and why (skip)."""

    max_document_mb: int = 256
    """Largest size in MiB of one conversation: a line, an entry of a JSON array or a row. Memory must hold the longest
    several times."""

    group_by_length: bool = False
    """Pack conversations with others of similar length, and run each step at the length of its own sequences: half of
    --seq-length, a quarter, and so on, down to a 64th. Evaluations keep --seq-length."""

    long_samples: LongSamples = "error"
    """Handling of a conversation longer than --seq-length: refuse the run (error), cut the conversation off there
    (truncate), or leave it out (skip)."""

"""Adapter for lm-eval (EleutherAI's evaluation harness): its LM interface over the model with the KV cache.

Nothing is truncated: a request longer than the model was built for is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from megatron.evaluation.errors import EvaluationError
from megatron.evaluation.ruler.run import Codec, continuation
from megatron.generation.cached_model import CachedModel
from megatron.generation.generate import generate
from megatron.generation.sampling import Sampling
from megatron.generation.token_scores import TokenScores, score_tokens

DEFAULT_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """An LM of lm-eval, for requests of at most `longest` tokens, answer included.

    Texts are encoded without a first token; an empty context is the end of a document.
    """

    def __init__(self, model: CachedModel, codec: Codec, longest: int, seed: int = 1234) -> None:
        super().__init__()
        self.model = model
        self.codec = codec
        self.longest = longest
        self.seed = seed

    @property
    def eot_token_id(self) -> int:
        return self.codec.eod

    @property
    def tokenizer_name(self) -> str:
        return type(self.codec).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.codec.tokenize(string)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text after an end of document, the whole text in one context."""
        results = []
        for request in requests:
            tokens = [self.prefix_token_id, *self.tok_encode(request.args[0])]
            results.append(float(self._score(tokens, 1).log_probabilities.sum()) if len(tokens) > 1 else 0.0)
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to a stop string, the end of document or the limit."""
        return [self._generate(*request.args) for request in requests]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for _texts, context, scored in requests:
            scores = self._score([*context, *scored], len(context))
            results.append((float(scores.log_probabilities.sum()), bool(scores.is_most_likely.all())))
        return results

    def _generate(self, context: str, options: Mapping[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
        limit = int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        self._check(len(prompt) + limit)
        (generated,) = generate(self.model, [prompt], [limit], sampling_of(options), self.codec.eod, self.seed)
        text = continuation(self.codec, prompt, generated.tokens[:-1] if generated.ended else generated.tokens)
        return text[: min((place for place in map(text.find, stops) if place >= 0), default=len(text))]

    def _score(self, tokens: Sequence[int], first: int) -> TokenScores:
        self._check(len(tokens))
        return score_tokens(self.model, tokens, first)

    def _check(self, num_tokens: int) -> None:
        if num_tokens > self.longest:
            raise EvaluationError(
                f"a request of the task takes {num_tokens} tokens, answer included, more than --max-length "
                f"({self.longest}); use a larger one, or shorter samples."
            )


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """Return the sampling of a task's generation_kwargs; EvaluationError for one that would not be honored."""
    known = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
    if unknown := sorted(set(options) - known):
        raise EvaluationError(
            f"generation_kwargs of the task ({', '.join(unknown)}) must be of {', '.join(sorted(known))}; set them in "
            "a copy of the task."
        )
    temperature = float(options.get("temperature", 1.0))
    if not options.get("do_sample", False) or temperature == 0:
        return Sampling(greedy=True)
    return Sampling(False, temperature, int(options.get("top_k", 0)), float(options.get("top_p", 1.0)))

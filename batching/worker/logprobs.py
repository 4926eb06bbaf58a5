"""Log-probabilities of tokens under the raw distribution, computed on the device in bulk."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batching.core.types import TokenLogprobs

PROMPT_LOGPROB_ROWS = 256  # prompt rows whose logits exist at once


@dataclass
class LogprobTensors:
    """For n tokens: id, logprob, rank [n], and the k most likely ids and logprobs [n, k]."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_tokens: torch.Tensor
    top_logprobs: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """All of it, in the constructor's order."""
        return list(vars(self).values())

    def entries(self, top: list[int]) -> list[TokenLogprobs]:
        """The values on the host; entry i with its `top[i]` most likely tokens."""
        columns = (t.tolist() for t in self.tensors())
        return [
            TokenLogprobs(token, logprob, rank, tuple(zip(ids[:k], values[:k], strict=True)))
            for k, token, logprob, rank, ids, values in zip(top, *columns, strict=True)
        ]


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> LogprobTensors:
    """Logprob and rank of `tokens` int64 [n] under float32 logits [n, vocab], and the top ones."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(1, tokens[:, None])
    ranks = (logits > own).sum(dim=-1) + 1
    values, ids = logits.topk(min(top, logits.shape[1]), dim=-1)
    return LogprobTensors(tokens, (own - total)[:, 0], ranks, ids, values - total)

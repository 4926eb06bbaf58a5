"""What a model asks of attention, found by watching it run once; and the refusal of what we lack.

For the probe the model runs a few tokens under an attention function that computes nothing but
records its arguments, and a mask builder that returns, in the mask's place, how many keys the
model's own mask function shows to a late query. So a layer's window is what the model's masks say,
and masks that are neither causal nor a sliding window are noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from batching.worker.attention import LayerSpec
from batching.worker.protocol import UnsupportedModelError

PROBE_NAME = "slipstream_probe"
PROBE_TOKENS = 4
UNKNOWN_MASK = -1
# Keywords that carry nothing for attention to do: positions are already in the rotated keys.
HARMLESS = {"position_ids", "cache_position", "use_cache", "is_causal", "output_router_logits"}
PAGED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def refuse_by_config(config: Any, text_config: Any) -> None:
    """Raise `UnsupportedModelError` if the model keeps state other than keys and values."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind}: encoder-decoder models are not supported")
    strange = set(getattr(text_config, "layer_types", None) or ()) - PAGED_LAYER_TYPES
    if strange:
        raise UnsupportedModelError(f"{kind}: layers of type {', '.join(sorted(strange))}")
    if getattr(text_config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{kind}: layers that share keys and values (num_kv_shared_layers)"
        )


def rope_limit(model: Any) -> int | None:
    """The longest context for which rotary frequencies are constant, or None if they always are.

    "dynamic" and "longrope" change all frequencies with the longest position in the batch: a
    sequence's result would depend on its neighbours, and cached keys would turn stale.
    """
    limits = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
            parameters = parameters.get(layer_type, parameters)
            if kind == "longrope":
                limits.append(int(parameters["original_max_position_embeddings"]))
            elif kind is not None and "dynamic" in kind:
                limits.append(int(module.max_seq_len_cached))
    return min(limits, default=None)


def freeze_rope(model: Any) -> None:
    """Stop per-forward frequency updates, which are without effect up to `rope_limit`."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            module.rope_type = dict.fromkeys(kinds, "default")
        elif kinds is not None:
            module.rope_type = "default"


class Probe:
    """Runs the model once and holds what its attention layers asked for, in layer order.

    Raises `UnsupportedModelError`, naming the feature, if a layer asks for what we cannot do.
    """

    def __init__(self, model: Any, max_model_len: int, tokens: int = PROBE_TOKENS) -> None:
        self.modules: list[nn.Module] = []
        self.specs: list[LayerSpec] = []
        self._kind = model.config.model_type
        self._max_model_len = max_model_len
        sequences = -(-tokens // max_model_len)
        self._tokens = -(-tokens // sequences)
        if getattr(model, "_is_stateful", False):
            raise UnsupportedModelError(f"{self._kind}: recurrent or convolutional state")
        ALL_ATTENTION_FUNCTIONS.register(PROBE_NAME, self._attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE_NAME, self._mask)
        model.set_attn_implementation(PROBE_NAME)
        shape = (sequences, self._tokens)
        ids = torch.zeros(shape, dtype=torch.int64, device=model.device)
        positions = torch.arange(self._tokens, device=model.device).expand(shape)
        model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if len(self.modules) != layers:
            raise UnsupportedModelError(
                f"{self._kind}: {len(self.modules)} of {layers} layers compute attention through "
                "transformers' attention interface"
            )

    def _mask(self, *, mask_function: Callable[..., Any], device: Any = None, **_: Any) -> Any:
        query = self._max_model_len
        seen = _visible_keys(mask_function, query), _visible_keys(mask_function, query - 1)
        is_full = seen == (query + 1, query)
        count = seen[0] if is_full or seen[0] == seen[1] else UNKNOWN_MASK
        return torch.full((1, 1, 1, 1), count, device=device)

    def _attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **asked: Any,
    ) -> tuple[torch.Tensor, None]:
        if any(module is other for other in self.modules):
            raise UnsupportedModelError(f"{self._kind}: an attention module that serves two layers")
        self.modules.append(module)
        self.specs.append(self._spec(query, key, value, attention_mask, asked))
        return query.transpose(1, 2)[..., : value.shape[-1]].contiguous(), None

    def _spec(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        asked: dict[str, Any],
    ) -> LayerSpec:
        scale, sinks = asked.pop("scaling", None), asked.pop("s_aux", None)
        softcap = asked.pop("softcap", None)
        window = self._window(mask, asked.pop("sliding_window", None))
        if asked.pop("dropout", None) or asked.get("is_causal") is False:
            raise UnsupportedModelError(
                f"{self._kind}: attention with dropout or without causality"
            )
        unknown = {
            n for n, v in asked.items() if n not in HARMLESS and v is not None and v is not False
        }
        if unknown:
            raise UnsupportedModelError(
                f"{self._kind}: attention with {', '.join(sorted(unknown))}"
            )
        if key.shape[2] != self._tokens or value.shape[-1] > query.shape[-1]:
            raise UnsupportedModelError(
                f"{self._kind}: attention over {tuple(key.shape)} keys, {tuple(value.shape)} values"
            )
        return LayerSpec(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_dim=query.shape[-1],
            scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
            window=window,
            softcap=None if softcap is None else float(softcap),
            sinks=None if sinks is None else sinks.detach().float().flatten(),
        )

    def _window(self, mask: torch.Tensor | None, passed: int | None) -> int | None:
        """The layer's window, None where it can never bind; checked against what was passed."""
        if mask is None:
            raise UnsupportedModelError(
                f"{self._kind}: attention without transformers' causal mask"
            )
        count = int(mask.item())
        if count == UNKNOWN_MASK:
            raise UnsupportedModelError(f"{self._kind}: a mask neither causal nor a sliding window")
        window = None if count > self._max_model_len else count
        if passed is not None and passed <= self._max_model_len and passed != window:
            raise UnsupportedModelError(
                f"{self._kind}: a layer's window is {passed}, but its mask shows {count} keys"
            )
        return window


def _visible_keys(mask_function: Callable[..., Any], query: int) -> int:
    """Keys shown to the query at a position, itself the last of them; `UNKNOWN_MASK` if not so."""
    keys, zero = torch.arange(query + 2), torch.tensor(0)
    shown = torch.as_tensor(mask_function(zero, zero, torch.tensor(query), keys)).expand(query + 2)
    count = int(shown.sum())
    is_suffix = not shown[-1] and bool(shown[query + 1 - count : query + 1].all())
    return count if is_suffix else UNKNOWN_MASK

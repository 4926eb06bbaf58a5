"""A transformers causal language model, run packed over paged attention.

With `load.py` and `probe.py` this is all that touches transformers' internals. The base model runs
on packed tokens [1, tokens] with explicit positions, no cache and no mask; each attention module
carries its own `PagedLayer` and reaches the step's geometry through it. The head runs separately,
on the few rows whose logits are wanted, through the model's own `forward`, so that whatever it does
to its logits (scaling, softcap) is kept.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from batching.worker.attention import AttentionBackend, AttentionMetadata, LayerSpec
from batching.worker.protocol import UnsupportedModelError
from batching.worker.sampling import largest

ATTENTION_NAME = "slipstream"


class Step:
    """Where the layers find the geometry of the step that runs now."""

    metadata: AttentionMetadata


class PagedLayer:
    """One attention layer's constants, pages and backend; hangs on its attention module."""

    def __init__(
        self,
        spec: LayerSpec,
        backend: AttentionBackend,
        pages: tuple[torch.Tensor, torch.Tensor],
        step: Step,
    ) -> None:
        self.spec = spec
        self.backend = backend
        self.pages = pages
        self.step = step


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    **proven: Any,
) -> tuple[torch.Tensor, None]:
    """What the model calls for attention: [1, heads, tokens, dim] in, [1, tokens, heads, dim] out.

    The keywords were checked and turned into the layer's `LayerSpec` when the model was loaded.
    """
    layer: PagedLayer = module.paged_layer  # type: ignore[assignment]
    width = value.shape[-1]
    if width < layer.spec.head_dim:  # expanded latent attention: values narrower than keys
        value = nn.functional.pad(value, (0, layer.spec.head_dim - width))
    output = layer.backend.forward(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layer.pages,
        layer.spec,
        layer.step.metadata,
    )
    return output[None, :, :, :width], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)


class _GivenOutput:
    """Stands for any base-model output: it has last hidden states and nothing else."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


class _GivenBase(nn.Module):
    """Takes the base model's place and returns the hidden states it is given."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> _GivenOutput:
        return _GivenOutput(input_ids)


def split_head(model: Any) -> nn.Module:
    """The model's own `forward` after its base model: hidden states [1, n, width] to output.

    The returned module shares all weights. Raises `UnsupportedModelError` if the model has no
    separate base model.
    """
    prefix = model.base_model_prefix
    if not prefix or prefix not in model._modules:
        raise UnsupportedModelError(f"{model.config.model_type}: the base model has no known name")
    head = copy.copy(model)
    head._modules = {**model._modules, prefix: _GivenBase()}
    return head


class PackedModel:
    """Implements `runner.Runner` with the transformers model itself, bound to its KV pages."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._step = Step()
        self._base = model.base_model
        # It would look at the tokens, and wait until the device knows them.
        self._base.warn_if_padding_and_no_attention_mask = lambda *_: None
        self._head = split_head(model)

    def bind(
        self,
        modules: list[nn.Module],
        specs: list[LayerSpec],
        backend: AttentionBackend,
        pages: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Give each attention module its pages, and switch the model to paged attention."""
        self._backend, self._specs = backend, specs
        for module, spec, layer_pages in zip(modules, specs, pages, strict=True):
            module.paged_layer = PagedLayer(spec, backend, layer_pages, self._step)  # type: ignore[assignment]
        self.model.set_attn_implementation(ATTENTION_NAME)

    @property
    def weight_bytes(self) -> int:
        tensors = (*self.model.parameters(), *self.model.buffers())
        shares = (getattr(t, "to_local", lambda t=t: t)() for t in tensors)
        return sum(share.nbytes for share in shares)

    @property
    def token_operations(self) -> int:
        """Multiplications and additions that a token takes on this device, roughly; no head's."""
        weights = (*self._base.parameters(), *self._base.buffers())
        table = self._base.get_input_embeddings().weight
        return 2 * (sum(tensor.numel() for tensor in weights) - table.numel())

    def hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        if metadata.schedule is None:
            metadata.schedule = self._backend.prepare(metadata, self._specs)
        return self.run(tokens, positions, metadata)

    def run(
        self, tokens: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """As `hidden`, with the schedule that the metadata has."""
        self._step.metadata = metadata
        output = self._base(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, return_dict=True
        )
        return output.last_hidden_state[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.scores(hidden).float()

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        if getattr(self.model, "has_plain_head", False):  # a tenth of the host's time
            return self.model.lm_head(hidden)
        output = self._head(input_ids=hidden[None], use_cache=False, return_dict=True)
        return output.logits[0]

    def largest(self, hidden: torch.Tensor) -> torch.Tensor:
        return largest(self.scores(hidden))

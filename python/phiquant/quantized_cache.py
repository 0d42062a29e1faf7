"""A cache of keys and values that holds codes: for `generate` and to measure what it costs.

    model.generate(**inputs, past_key_values=pq.quantized_cache(model))

What attention reads is what the codes decode to, of the newest token as well. B = batch, G = key-value heads,
T = tokens, D = head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .errors import PhiquantError
from .extras import need
from .fake_quant import encode_dynamic
from .models import phi
from .spec import Float, Int, PerGroup, PerToken, QuantSpec
from .spec import spec as read_spec
from .tensor import QuantizedTensor

INT8 = "int8-token-sym-f16"
_STATE = ("keys", "values", "key_scales", "value_scales")  # codes [B, G, T, D], scales [B, G, T, D / group]


def quantized_cache(model: Any, spec: str | QuantSpec = INT8) -> Any:
    """An empty cache for a Phi-3 model: transformers' Cache whose layers hold 8-bit codes and scales.

    spec: "int8-token-sym-f16", a scale for each token and head; a group of g values of a head each, "int8-g32-sym-f16";
        "fp8_e4m3-..." instead of integers. Scales are stored as it says.
    PhiquantError for other grids, and for groups that do not divide the head size.
    """
    return _cache_class()(check(spec, phi.sizes(model.config.to_dict()).head_dim))


def check(spec: str | QuantSpec, head: int) -> QuantSpec:
    """The spec, if keys and values of `head` values can have it."""
    spec = read_spec(spec)
    eight = isinstance(spec.element, Int | Float) and spec.element.bits == 8
    scaled = isinstance(spec.granularity, PerToken | PerGroup) and spec.two_level is None
    if not (eight and scaled and spec.symmetric and spec.anchor == "absmax"):
        raise PhiquantError(
            f"keys and values are stored in 8 bits, symmetric, with a scale per token or group, not as {spec}; "
            f"use {INT8!r}, 'int8-g32-sym-f16' or 'fp8_e4m3-token-sym-f16'"
        )
    if isinstance(spec.granularity, PerGroup) and head % spec.granularity.size:
        fits = [g for g in (8, 16, 32, 48, 64, 96, 128) if head % g == 0]
        raise PhiquantError(
            f"groups of {spec.granularity.size} do not divide the {head} values of a head; "
            f"these would: {', '.join(map(str, fits)) or 'none'}; or {INT8!r}"
        )
    return spec


@lru_cache(maxsize=1)
def _cache_class() -> Any:
    """Made when it is asked for: it is a class of transformers, which is optional."""
    cache_utils = need("transformers.cache_utils", extra="hf")

    class QuantizedCacheLayer(cache_utils.DynamicLayer):  # type: ignore[name-defined]
        """One layer's keys and values as codes; what DynamicLayer does to tensors is done to their scales too."""

        keys: Any
        values: Any
        key_scales: Any
        value_scales: Any
        is_initialized: bool

        def __init__(self, spec: QuantSpec) -> None:
            super().__init__()
            self.spec = spec

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            keys, values = encode_dynamic(key_states, self.spec), encode_dynamic(value_states, self.spec)
            new: dict[str, Any] = dict(zip(_STATE, (keys.codes, values.codes, keys.scales, values.scales), strict=True))
            if not self.is_initialized:
                self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
                self._every(lambda name, _: new[name])
            else:
                self._every(lambda name, old: torch.cat([old, new[name]], -2))
            return self._decode(self.keys, self.key_scales), self._decode(self.values, self.value_scales)

        def _decode(self, codes: Tensor, scales: Tensor) -> Tensor:
            return QuantizedTensor(codes, scales, None, None, self.spec).dequantize(self.dtype)

        def _every(self, change: Callable[[str, Any], Any]) -> None:
            for name in _STATE if self.is_initialized else ():
                setattr(self, name, change(name, getattr(self, name, None)))

        def reset(self) -> None:
            super().reset()
            self.key_scales = self.value_scales = None

        def crop(self, tokens_to_remove: int) -> None:
            if tokens_to_remove > 0:
                raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
            if tokens_to_remove:
                self._every(lambda _, old: old[..., :tokens_to_remove, :].contiguous())

        def batch_repeat_interleave(self, repeats: int) -> None:
            self._every(lambda _, old: old.repeat_interleave(repeats, 0))

        def batch_select_indices(self, indices: Tensor) -> None:
            self._every(lambda _, old: old[indices])

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self._every(lambda _, old: old[beam_idx.to(old.device)])

        def offload(self) -> None:
            self._every(lambda _, old: old.to("cpu", non_blocking=True))

        def prefetch(self) -> None:
            self._every(lambda _, old: old.to(self.device, non_blocking=True))

    class QuantizedCache(cache_utils.Cache):  # type: ignore[name-defined]
        """spec: of keys and values. nbytes: of the codes and scales that it holds."""

        def __init__(self, spec: QuantSpec) -> None:
            super().__init__(layer_class_to_replicate=lambda: QuantizedCacheLayer(spec))
            self.spec = spec

        @property
        def nbytes(self) -> int:
            held = (getattr(layer, name, None) for layer in self.layers for name in _STATE)
            return sum(tensor.nbytes for tensor in held if tensor is not None)

    return QuantizedCache

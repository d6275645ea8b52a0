"""Attention with its projections taken apart, so that each can have quantizers.

`nn.MultiheadAttention` hands all its weights to one function, which leaves no place between the
heads and the last projection. Here the same operations run in the same order on the same layout, so
that without quantizers the result is that of `nn.MultiheadAttention` bit for bit; only the last
projection is called as the module it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_torch: Any = F  # for helpers of its own attention, which type stubs leave out

Weights = Callable[[str], Tensor]
"""Gives the weight of an input projection by the name of its parameter."""


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `nn.MultiheadAttention.forward` returns, see there for arguments and shapes.

    Args:
        module: The `nn.MultiheadAttention`; its `out_proj` is called.
        query: Queries, as they enter the projection; identity with `key` and `value` counts.
        key: Keys.
        value: Values.
        weights: The weights of the input projections.
        key_padding_mask: As in torch, like all that follow.
        need_weights: Whether the attention weights are returned, too.
        attn_mask: Mask of queries and keys.
        average_attn_weights: Whether they are averaged over the heads.
        is_causal: A hint that `attn_mask` is the causal mask.

    Raises:
        RuntimeError: If shapes do not go together, as torch does.
    """
    batched = query.dim() == 3
    padding = F._canonical_mask(
        mask=key_padding_mask,
        mask_name="key_padding_mask",
        other_type=F._none_or_dtype(attn_mask),
        other_name="attn_mask",
        target_type=query.dtype,
    )
    mask = F._canonical_mask(
        mask=attn_mask,
        mask_name="attn_mask",
        other_type=None,
        other_name="",
        target_type=query.dtype,
        check_other=False,
    )
    if module.batch_first and batched:
        swapped = query.transpose(1, 0)
        swapped_key = swapped if key is query else key.transpose(1, 0)  # torch looks at identity
        value = swapped_key if value is key else value.transpose(1, 0)
        query, key = swapped, swapped_key
    _torch._mha_shape_check(query, key, value, padding, mask, module.num_heads)
    if is_causal and mask is None:
        raise RuntimeError(
            "MultiheadAttention: got is_causal=True without attn_mask; it is a hint about the "
            "mask. Give both: torch.nn.Transformer.generate_square_subsequent_mask makes one."
        )
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        padding = None if padding is None else padding.unsqueeze(0)
    length, batch, width = query.shape
    if is_causal and padding is None and not need_weights:
        mask = None
    elif padding is not None:
        is_causal = False  # the mask that both make is no longer the causal one
    q, k, v = _project(module, query, key, value, weights)
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(0)

    if module.bias_k is not None:
        k = torch.cat([k, module.bias_k.repeat(1, batch, 1)])
        v = torch.cat([v, module.bias_v.repeat(1, batch, 1)])
        mask, padding = _one_more_key(mask), _one_more_key(padding)
    heads = batch * module.num_heads
    q, k, v = (
        x.reshape(x.shape[0], heads, width // module.num_heads).transpose(0, 1) for x in (q, k, v)
    )
    if module.add_zero_attn:
        zeros = k.new_zeros(heads, 1, k.shape[2])
        k, v = torch.cat([k, zeros], 1), torch.cat([v, zeros], 1)
        mask, padding = _one_more_key(mask), _one_more_key(padding)
    keys = k.shape[1]
    if padding is not None:
        padding = padding.view(batch, 1, 1, keys).expand(-1, module.num_heads, -1, -1)
        padding = padding.reshape(heads, 1, keys)
        mask = padding if mask is None else mask + padding

    dropout = module.dropout if module.training else 0.0
    scores: Tensor | None = None
    if need_weights:
        q = q * math.sqrt(1.0 / q.shape[2])
        transposed = k.transpose(-2, -1)
        scores = torch.bmm(q, transposed) if mask is None else torch.baddbmm(mask, q, transposed)
        scores = F.softmax(scores, dim=-1)
        if dropout > 0.0:
            scores = F.dropout(scores, p=dropout)
        mixed = torch.bmm(scores, v).transpose(0, 1).reshape(length * batch, width)
        scores = scores.view(batch, module.num_heads, length, keys)
        if average_attn_weights:
            scores = scores.mean(dim=1)
    else:
        if mask is not None:
            one_for_all = mask.shape[0] == 1
            mask = (
                mask.unsqueeze(0) if one_for_all else mask.view(batch, module.num_heads, -1, keys)
            )
        q, k, v = (x.view(batch, module.num_heads, x.shape[1], x.shape[2]) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        mixed = mixed.permute(2, 0, 1, 3).reshape(batch * length, width)
    output = module.out_proj(mixed).view(length, batch, -1)
    if not batched:
        return output.squeeze(1), None if scores is None else scores.squeeze(0)
    return (output.transpose(1, 0) if module.batch_first else output), scores


def each_input(
    quantizers: Callable[[str], Callable[[Tensor], Tensor] | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values quantized, and what is one tensor quantized once.

    Args:
        quantizers: What quantizes the input of a name, or None.
        query: Queries.
        key: Keys.
        value: Values.
    """

    def of(name: str, x: Tensor) -> Tensor:
        quantizer = quantizers(name)
        return x if quantizer is None else quantizer(x)

    q = of("query", query)
    k = q if key is query else of("key", key)
    v = q if value is query else k if value is key else of("value", value)
    return q, k, v


def _project(
    module: Any, query: Tensor, key: Tensor, value: Tensor, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    bias = module.in_proj_bias
    if module._qkv_same_embed_dim:
        packed: list[Tensor] = _torch._in_projection_packed(
            query, key, value, weights("in_proj_weight"), bias
        )
        return packed[0], packed[1], packed[2]
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    q, k, v = (
        F.linear(x, weights(f"{name}_proj_weight"), own_bias)
        for x, name, own_bias in zip((query, key, value), "qkv", biases, strict=True)
    )
    return q, k, v


def _one_more_key(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else F.pad(mask, (0, 1))

"""The expected results of calls: the plain-torch reference's bits where arithmetic defines them."""

from __future__ import annotations

import torch

from quaver import reference

E4M3 = torch.float8_e4m3fn


def delayed(history, dtype, power_of_two, x):
    """The decode scale of a cast and the history after it, of states that casts can leave."""
    count, ring = int(history[0]), history[1:].tolist()
    oracle = reference.DelayedScale(dtype, power_of_two)
    order = ring[:count] if count < 16 else ring[count % 16 :] + ring[: count % 16]
    oracle.history.extend(order)
    return oracle.cast(x)[1]


def usual(history) -> bool:
    """Whether casts could have left this state."""
    count = history[0].item()
    return count in range(32) and bool((history[1:] >= 0).all() and history.isfinite().all())


def scale_of(x, dtype, scale, history, power_of_two):
    """The scale of a whole-tensor cast; None where the history is none that casts leave."""
    if scale is not None:
        return scale.reshape(())
    if history is None:
        return reference.quantize(x, dtype, power_of_two=power_of_two)[1]
    return delayed(history, dtype, power_of_two, x) if usual(history) else None


def quantize(x, dtype, scale, history, grain, block, power_of_two, stochastic, seed):
    if grain == "tensor":
        scale = scale_of(x, dtype, scale, history, power_of_two)
        if scale is None:
            return None
    else:
        shape = reference.quantize(x, dtype, None, grain, block)[1].shape
        scale = None if scale is None else scale.reshape(shape)
    q, scale, amax = reference.quantize(x, dtype, scale, grain, block, power_of_two)
    if stochastic:
        ratio = x.float() / reference.expand_scale(scale, x, grain, block)
        q = reference.encode_stochastic(ratio, dtype, seed)
    return q, scale, amax


def dequantize(q, scale, dtype, grain, block):
    shape = reference.quantize(q, E4M3, None, grain, block)[1].shape
    return (reference.dequantize(q, scale.reshape(shape), dtype, grain, block),)


def cast_transpose(x, dtype, scale, history, power_of_two):
    scale = scale_of(x, dtype, scale, history, power_of_two)
    return scale if scale is None else reference.cast_transpose(x, dtype, scale)


def cast_layouts(x, dtype, grain, rows, columns, power_of_two, tiles_t):
    q, scale, qt, qt_scale = reference.cast_layouts(x, dtype, grain, power_of_two, tiles_t)
    none, no_scale = torch.empty(0, dtype=dtype), torch.empty(0)
    return (
        *((q, scale) if rows else (none, no_scale)),
        *((qt, qt_scale) if columns else (none, no_scale)),
    )


def normalize(x, weight, bias, eps, centered, dtype, scale, history, power_of_two, block):
    y, mean, rstd = reference.normalize(x, weight, bias, eps, centered)
    scale = scale_of(y, dtype, scale, history, power_of_two)
    if scale is None:
        return None
    mean = mean if centered else mean[:0]
    saved = reference.save_groups(x, block)
    return *reference.cast_for_gemm(y, dtype, scale), *saved, mean, rstd


def normalize_layouts(x, weight, bias, eps, centered, dtype, tiles_t, power_of_two, block):
    y, mean, rstd = reference.normalize(x, weight, bias, eps, centered)
    layouts = reference.cast_layouts(y, dtype, "block", power_of_two, tiles_t)
    return *layouts, *reference.save_groups(x, block), mean if centered else mean[:0], rstd


def normalize_backward(dy, xq, xscale, mean, rstd, weight, block, has_bias, dtype):
    x, centered = reference.load_groups(xq, xscale, block), mean.numel() > 0
    mean = mean if centered else torch.zeros(len(dy))
    dx, dweight, dbias = reference.normalize_backward(dy, x, mean, rstd, weight, centered)
    dx = reference.encode(dx, dtype) if dtype == torch.float16 else dx.to(dtype)
    return dx, dweight if weight is not None else dweight[:0], dbias if has_bias else dbias[:0]


def activate(x, up, kind, channel_scale, dtype, scale, history, power_of_two, block):
    none = torch.empty(0, dtype=E4M3), torch.empty(0, dtype=torch.uint8)
    saved = reference.save_groups(x, block)
    return (
        None,
        None,
        None,
        None,
        *saved,
        *(none if up is None else reference.save_groups(up, block)),
        None,
    )


def activate_layouts(x, up, kind, channel_scale, dtype, tiles_t, power_of_two, block):
    return activate(x, up, kind, channel_scale, dtype, None, None, power_of_two, block)


def accumulate_(q, scale, amax, other, other_scale, other_amax):
    return reference.accumulate(q, scale, amax, other, other_scale, other_amax)


def share_scales(amaxes, mu, dtype):
    pairs = [
        reference.shared_scale(column.tolist(), dtype, None if mu is None else mu[i].item())
        for i, column in enumerate(amaxes.t())
    ]
    return tuple(torch.stack(s) for s in zip(*pairs, strict=True)) if pairs else None


def pack(tensors, tensor_scales, scales, dtype, length):
    bucket = torch.zeros(length)
    offset = 0
    for t, own, scale in zip(tensors, tensor_scales, scales, strict=True):
        values = t.float().flatten() * (own.reshape(()) if own.numel() else 1.0)
        bucket[offset : offset + t.numel()] = values / scale
        offset += -(-t.numel() // 16) * 16
    return (to(bucket, dtype),)


def reduce_shards(shards, scales, sum_scales, sizes, first, dtype):
    out, amaxes, saturated = torch.zeros(shards.shape[1]), [], []
    codes, offset = to(out, dtype), -first
    for i, size in enumerate(sizes):
        begin, offset = max(offset, 0), offset + -(-size // 16) * 16
        part = slice(begin, max(begin, min(offset, shards.shape[1])))
        total = torch.zeros(part.stop - part.start)
        for k, shard in enumerate(shards):
            value = shard[part].float() * (1.0 if scales is None else scales[i])
            total = value if k == 0 else total + value
        amaxes.append(total.abs().amax() if total.numel() else torch.zeros(()))
        codes[part] = to(total / (1.0 if sum_scales is None else sum_scales[i]), dtype)
        top = torch.finfo(dtype).max
        seen = (codes[part].float().abs() == top).sum() if dtype.itemsize == 1 else torch.zeros(())
        saturated.append(seen.int())
    none = torch.empty(0)
    return (
        codes,
        torch.stack(amaxes or [none])[: len(sizes)].reshape(-1),
        (torch.stack(saturated) if saturated else none.int()),
    )


def to(x, dtype):
    return x.to(dtype) if dtype in (torch.float32, torch.bfloat16) else reference.encode(x, dtype)


def encode_state(x, dtype, expand):
    return reference.encode_state(x, dtype, expand)


def decode_state(q, scale, expand):
    return (reference.decode_state(q, scale, expand),)


def rotate(parts, cos, sin, turned, inverse):
    return (reference.rotate(parts, cos, sin, turned, inverse),)


def nf4_encode(x, block):
    return reference.nf4_encode(x, block)


def nf4_decode(codes, absmax, numel, dtype, block):
    return (reference.nf4_decode(codes, absmax, numel, dtype, block),)


def subset_sums(grads, scales, amaxes, subsets):
    amax, sums = [], []
    for grad, scale, seen, width in zip(grads, scales, amaxes, subsets, strict=True):
        x = grad.float() * scale if scale.numel() else grad.float()
        bad = not (seen.isfinite().all() and scale.isfinite().all())
        most = x.abs().max() if x.numel() else torch.zeros(())
        amax.append(torch.full((), torch.nan) if bad else most)
        sums.append(reference.subset_sums(x, width))
    return torch.stack(amax), torch.cat(sums)


EXACT = {
    f.__name__: f
    for f in (quantize, dequantize, cast_transpose, cast_layouts, normalize, normalize_layouts,
              normalize_backward, activate, activate_layouts, accumulate_, share_scales, pack,
              reduce_shards, encode_state, decode_state, nf4_encode, nf4_decode, rotate,
              subset_sums)
}  # fmt: skip

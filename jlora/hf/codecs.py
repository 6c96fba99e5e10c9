"""Weights as others quantised them: some rows of the numbers that codes and scales stand for, in NumPy.

Every function takes the stored tensors of one weight [out, in] by what they are called there, as mapped files, and the
rows and columns that are wanted, each [start, stop); it reads no other rows, and where codes of a row lie together, no
more than the row. It gives float32: the arithmetic of the library that wrote them, before that library rounds the
product to 16 bits.
"""

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jlora.model.quant import NF4_LEVELS

Range = tuple[int, int]
Parts = Mapping[str, np.ndarray]

# bitsandbytes' 4-bit float, by code: a sign, two bits of exponent, one of mantissa, over its largest, 12.
_FP4 = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32) / np.float32(12.0)
BNB_LEVELS = {"nf4": NF4_LEVELS, "fp4": np.concatenate([_FP4, np.float32(0.0) - _FP4])}
# 1 / 127 as bitsandbytes has it, which is not the nearest float32.
BNB_INT8_UNIT = np.float32(7.874015718698502e-3)

# OCP's 4-bit float e2m1, by code.
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
E2M1 = np.concatenate([_E2M1, -_E2M1])


def _pairs(levels: np.ndarray, high_first: bool) -> np.ndarray:
    """What the two codes of each byte stand for, float32s side by side in one number, which are looked up at once."""
    codes = np.arange(256)
    high, low = levels[codes >> 4], levels[codes & 15]
    return np.stack([high, low] if high_first else [low, high], 1).view(np.complex64)[:, 0]


BNB_PAIRS = {kind: _pairs(levels, high_first=True) for kind, levels in BNB_LEVELS.items()}
E2M1_PAIRS = _pairs(E2M1, high_first=False)

# AutoAWQ's GEMM layout: output j of eight lies in so many nibbles from the lowest of its word.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
AWQ_BITS = 4
# GPTQ packs so many codes of any width into whole words.
RUN = 32


def _table(dtype: type) -> np.ndarray:
    """What each byte stands for, float32; looked up many times faster than NumPy converts."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


BYTES: dict[str, np.ndarray] = {
    "F8_E4M3": _table(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": _table(ml_dtypes.float8_e5m2),
    "F8_E8M0": _table(ml_dtypes.float8_e8m0fnu),
    "I8": _table(np.int8),
    "U8": _table(np.uint8),
}


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of each row, uint8 [rows count], that lie end to end in its words, lowest bits first.

    Args:
      words: [rows words] of integers of any width, or bytes.
    """
    packed = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:
        several = np.empty((*packed.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):
            several[..., i] = packed >> np.uint8(bits * i) & np.uint8(2**bits - 1)
        codes = several.reshape(len(packed), -1)
    else:
        ones = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little").reshape(len(packed), count, bits)
        codes = np.packbits(ones, axis=2, bitorder="little")[..., 0]
    return codes[:, :count]


def by_group(
    operation: np.ufunc,
    values: np.ndarray,
    each: np.ndarray,
    columns: Range,
    size: int,
    index: np.ndarray | None = None,
) -> None:
    """`operation` of values and what their group has, in place.

    Args:
      values: [rows columns]. each: [rows groups], or of one group.
      size: columns of a group, of the whole weight's. index: the group of each, where groups are no runs.
    """
    if each.shape[1] == 1:
        operation(values, each, out=values)
    elif index is None and columns[0] % size == columns[1] % size == 0:
        runs = values.reshape(len(values), -1, size)
        operation(runs, each[:, columns[0] // size : columns[1] // size, None], out=runs)
    else:
        groups = np.arange(*columns) // size if index is None else np.asarray(index.reshape(-1)[slice(*columns)])
        operation(values, np.take(each, groups, axis=1), out=values)


def bnb_4bit(parts: Parts, rows: Range, columns: Range, *, width: int, block: int, kind: str, offset: float | None,
             nested: int) -> np.ndarray:  # fmt: skip
    """bitsandbytes' nf4 and fp4: codes run through the whole matrix, two in a byte, the first in its high half.

    Args:
      parts: `weight`, of any dtype; `absmax`; with double quantisation `nested_absmax` and `nested_quant_map`.
      width: inputs of the whole weight.
      block: codes that share an absmax. nested: absmaxes that share one of their own.
      kind: nf4 or fp4.
      offset: what is added to an absmax that was quantised, too; None where none was.
    """
    first, last = rows[0] * width, rows[1] * width
    stored = parts["weight"].reshape(-1).view(np.uint8)[first // 2 : -(-last // 2)]
    values = BNB_PAIRS[kind][stored].view(np.float32)[first % 2 :][: last - first]
    start, stop = first // block, -(-last // block)
    absmax = bnb_absmax(parts, (start, stop), offset, nested)
    if first % block == last % block == 0:
        values.reshape(-1, block)[...] *= absmax[:, None]
    else:
        values *= np.repeat(absmax, block)[first - start * block :][: last - first]
    return values.reshape(-1, width)[:, slice(*columns)]


def bnb_absmax(parts: Parts, blocks: Range, offset: float | None, nested: int) -> np.ndarray:
    """The absmax of some blocks, float32; see `bnb_4bit`."""
    absmax = parts["absmax"].reshape(-1)[slice(*blocks)]
    if offset is None:
        return absmax.astype(np.float32)
    second = np.asarray(parts["nested_absmax"].reshape(-1), np.float32)[np.arange(*blocks) // nested]
    return np.asarray(parts["nested_quant_map"].reshape(-1), np.float32)[absmax] * second + np.float32(offset)


def bnb_nf4_codes(parts: Parts, rows: Range, columns: Range, *, width: int) -> np.ndarray:
    """Codes of nf4 in the order of `quant.Quantized`, uint8 [rows columns]; a column is a byte, 32 are a block.

    There byte i of a block holds elements i and i + 32, here 2 i + 1 and 2 i.
    """
    rows_of_bytes = parts["weight"].reshape(-1).view(np.uint8).reshape(-1, width // 2)
    stored = rows_of_bytes[slice(*rows), slice(*columns)].reshape(rows[1] - rows[0], -1, 32)
    pairs = np.empty((*stored.shape, 2), np.uint8)
    pairs[..., 0], pairs[..., 1] = stored >> 4, stored & 15
    codes = pairs.reshape(*stored.shape[:2], 64)
    return (codes[..., :32] | codes[..., 32:] << 4).reshape(len(stored), -1)


def bnb_nf4_scales(parts: Parts, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scales and second of `quant.Quantized` [blocks out] and [segments out], of a weight in blocks of 64 and 256."""
    outputs, num_blocks = shape[0], shape[1] // 64
    scales = parts["absmax"].reshape(outputs, num_blocks).T
    starts = np.arange(0, num_blocks, math.gcd(num_blocks, 256))
    groups = (np.arange(outputs) * num_blocks + starts[:, None]) // 256
    return np.ascontiguousarray(scales), np.asarray(parts["nested_absmax"].reshape(-1), np.float32)[groups]


def bnb_int8(parts: Parts, rows: Range, columns: Range) -> np.ndarray:
    """bitsandbytes' LLM.int8: `weight` [out in] of int8 and `SCB` [out], each row's largest."""
    values = BYTES["I8"][parts["weight"][slice(*rows), slice(*columns)].view(np.uint8)]
    values *= np.asarray(parts["SCB"].reshape(-1)[slice(*rows)], np.float32)[:, None]
    values *= BNB_INT8_UNIT
    return values


def scaled_bytes(parts: Parts, rows: Range, columns: Range, *, stored: str, scale: str, block: tuple[int, int]
                 ) -> np.ndarray:  # fmt: skip
    """One byte a weight times a scale: FP8 or int8, by tensor, channel, group or block.

    Args:
      parts: `weight` [out in]; `scale`, one for each block; `zero` and `index` where there are some, the
        codes that stand for zero, and the group of each column.
      stored, scale: what `weight` and `scale` are stored as, by safetensors' names.
      block: rows and columns of a block.
    """
    values = BYTES[stored][np.ascontiguousarray(parts["weight"][slice(*rows), slice(*columns)]).view(np.uint8)]
    return _scaled(values, parts, rows, columns, scale, block)


def packed_rows(parts: Parts, rows: Range, columns: Range, *, bits: int, width: int, block: tuple[int, int]
                ) -> np.ndarray:  # fmt: skip
    """compressed-tensors' pack-quantized: codes of a row lie in `weight`, int32 words; else as `scaled_bytes`.

    Args:
      width: inputs of the whole weight.
    """
    codes = unpack(parts["weight"][slice(*rows)], bits, width)[:, slice(*columns)]
    values = np.ascontiguousarray(codes, np.float32)
    if "zero" in parts:  # packed too, down the rows
        first, last = rows[0] // RUN, -(-rows[1] // RUN)
        words = parts["zero"][first * bits : last * bits].T
        zero = unpack(words, bits, min(words.shape[1] * 32 // bits, (last - first) * RUN)).T
        zero = zero[rows[0] - first * RUN :][: rows[1] - rows[0]].astype(np.float32)
        by_group(np.subtract, values, zero, columns, block[1], parts.get("index"))
        parts = {name: part for name, part in parts.items() if name != "zero"}
    else:
        values -= np.float32(2 ** (bits - 1))
    return _scaled(values, parts, rows, columns, "F32", block)


def packed_e2m1(parts: Parts, rows: Range, columns: Range, *, scale: str, group: int) -> np.ndarray:
    """4-bit floats in groups, NVFP4 and MXFP4 of compressed-tensors: two codes in a byte, the first in its low half.

    Args:
      parts: `weight` [out in/2] of bytes; `scale` [out groups] of bytes; for NVFP4 `global`, which divides it.
      scale: what `scale` is stored as.
      group: columns of a group.
    """
    first, last = columns[0] // 2, -(-columns[1] // 2)
    values = E2M1_PAIRS[parts["weight"][slice(*rows), first:last]].view(np.float32)
    values = np.ascontiguousarray(values[:, columns[0] - 2 * first :][:, : columns[1] - columns[0]])
    return _scaled(values, parts, rows, columns, scale, (1, group))


def gptq(
    parts: Parts, rows: Range, columns: Range, *, bits: int, group: int, plus: int, runs: bool = True
) -> np.ndarray:
    """GPTQ's layout: codes of an output lie down its column of `qweight`, int32 words.

    Args:
      parts: `qweight` [in*bits/32 out], `qzeros` [groups out*bits/32], `scales` [groups out]; `g_idx` [in] where the
        groups are no runs of inputs.
      group: inputs of a group. runs: groups are runs. plus: what a stored zero lacks, 1 in the first version.
    """
    codes = unpack(parts["qweight"][:, slice(*rows)].T, bits, parts["qweight"].shape[0] * 32 // bits)
    first, last = rows[0] // RUN, -(-rows[1] // RUN)
    zeros = unpack(parts["qzeros"][:, first * bits : last * bits], bits, (last - first) * RUN)
    zeros = zeros[:, rows[0] - first * RUN :][:, : rows[1] - rows[0]]
    zeros = zeros + np.uint8(plus) & np.uint8(2**bits - 1)
    values = np.ascontiguousarray(codes[:, slice(*columns)], np.float32)
    index = None if runs else parts["g_idx"]
    by_group(np.subtract, values, zeros.T.astype(np.float32), columns, group, index)
    by_group(np.multiply, values, parts["scales"][:, slice(*rows)].T.astype(np.float32), columns, group, index)
    return values


def awq(parts: Parts, rows: Range, columns: Range, *, group: int) -> np.ndarray:
    """AutoAWQ's GEMM layout: eight outputs of an input lie in an int32 word of `qweight`.

    Args:
      parts: `qweight` [in out/8], `qzeros` [groups out/8], `scales` [groups out].
      group: inputs of a group.
    """
    first, last = rows[0] // 8, -(-rows[1] // 8)

    def outputs(words: np.ndarray) -> np.ndarray:
        packed = np.ascontiguousarray(words[:, first:last].T).view(np.uint8).reshape(last - first, len(words), 4)
        codes = np.empty((last - first, 8, len(words)), np.float32)
        for output, nibble in enumerate(AWQ_ORDER):
            codes[:, output] = packed[..., nibble // 2] >> np.uint8(4 * (nibble % 2)) & np.uint8(15)
        return codes.reshape(-1, len(words))[rows[0] - 8 * first :][: rows[1] - rows[0]]

    values = outputs(parts["qweight"][slice(*columns)])
    by_group(np.subtract, values, outputs(parts["qzeros"]), columns, group)
    by_group(np.multiply, values, parts["scales"][:, slice(*rows)].T.astype(np.float32), columns, group)
    return values


def _scaled(
    values: np.ndarray, parts: Parts, rows: Range, columns: Range, scale: str, block: tuple[int, int]
) -> np.ndarray:
    """`values` less what stands for zero, times their scales, in place."""

    def of_rows(each: np.ndarray) -> np.ndarray:
        """[] and [1] are of one row and column, [out] of one column."""
        each = each.reshape(each.shape[0] if each.ndim else 1, -1)
        return each if len(each) == 1 else each[np.arange(*rows) // block[0]]

    index = parts.get("index")
    if "zero" in parts:
        by_group(np.subtract, values, of_rows(parts["zero"]).astype(np.float32), columns, block[1], index)
    scales = of_rows(parts["scale"])
    scales = BYTES[scale][scales.view(np.uint8)] if scale in BYTES else scales.astype(np.float32)
    if "global" in parts:
        scales = scales / np.asarray(parts["global"].reshape(()), np.float32)
    by_group(np.multiply, values, scales, columns, block[1], index)
    return values

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
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (packed[..., None] >> shifts & np.uint8(2**bits - 1)).reshape(len(packed), -1)
    else:
        ones = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little").reshape(len(packed), count, bits)
        codes = np.packbits(ones, axis=2, bitorder="little")[..., 0]
    return codes[:, :count]


def spread(scales: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Each wanted weight's scale, float32 [rows columns], or of one row or column where all have the same.

    Args:
      scales: of two dims; [] and [1] are of one row and column, [out] of one column.
      rows, columns: which of them each wanted row and column has.
    """
    scales = scales.reshape(scales.shape[0] if scales.ndim else 1, -1)
    scales = scales if scales.shape[0] == 1 else scales[rows]
    scales = np.asarray(scales, np.float32)
    return scales if scales.shape[1] == 1 else np.take(scales, columns, axis=1)


def blocks_of(columns: Range, size: int) -> np.ndarray:
    """The block that each of a range lies in."""
    return np.arange(*columns) // size


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
    codes = np.empty((len(stored), 2), np.uint8)
    codes[:, 0], codes[:, 1] = stored >> 4, stored & 15
    values = BNB_LEVELS[kind][codes.reshape(-1)[first % 2 :][: last - first]]
    start, stop = first // block, -(-last // block)
    absmax = bnb_absmax(parts, (start, stop), offset, nested)
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
    values = BYTES[stored][parts["weight"][slice(*rows), slice(*columns)].view(np.uint8)]
    return _scaled(values, parts, rows, columns, scale, block)


def packed_rows(parts: Parts, rows: Range, columns: Range, *, bits: int, width: int, block: tuple[int, int]
                ) -> np.ndarray:  # fmt: skip
    """compressed-tensors' pack-quantized: codes of a row lie in `weight`, int32 words; else as `scaled_bytes`.

    Args:
      width: inputs of the whole weight.
    """
    codes = unpack(parts["weight"][slice(*rows)], bits, width)[:, slice(*columns)]
    values = codes.astype(np.float32)
    if "zero" in parts:  # packed too, down the rows
        first, last = rows[0] // RUN, -(-rows[1] // RUN)
        words = parts["zero"][first * bits : last * bits].T
        zero = unpack(words, bits, min(words.shape[1] * 32 // bits, (last - first) * RUN)).T
        zero = zero[rows[0] - first * RUN :][: rows[1] - rows[0]]
        parts = {name: part for name, part in parts.items() if name != "zero"}
        values -= spread(zero, np.arange(len(zero)), _groups(parts, columns, block[1]))
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
    codes = unpack(parts["weight"][slice(*rows), first:last], 4, 2 * (last - first))
    values = E2M1[codes[:, columns[0] - 2 * first :][:, : columns[1] - columns[0]]]
    return _scaled(values, parts, rows, columns, scale, (1, group))


def gptq(parts: Parts, rows: Range, columns: Range, *, bits: int, group: int, plus: int) -> np.ndarray:
    """GPTQ's layout: codes of an output lie down its column of `qweight`, int32 words.

    Args:
      parts: `qweight` [in*bits/32 out], `qzeros` [groups out*bits/32], `scales` [groups out]; `g_idx` [in] where the
        groups are no runs of inputs.
      group: inputs of a group. plus: what a stored zero lacks, 1 in the first version of the format.
    """
    codes = unpack(parts["qweight"][:, slice(*rows)].T, bits, parts["qweight"].shape[0] * 32 // bits)
    first, last = rows[0] // RUN, -(-rows[1] // RUN)
    zeros = unpack(parts["qzeros"][:, first * bits : last * bits], bits, (last - first) * RUN)
    zeros = zeros[:, rows[0] - first * RUN :][:, : rows[1] - rows[0]]
    zeros = zeros + np.uint8(plus) & np.uint8(2**bits - 1)
    values = codes[:, slice(*columns)].astype(np.float32)
    groups = _groups({"index": parts["g_idx"]} if "g_idx" in parts else {}, columns, group)
    values -= np.take(zeros.T.astype(np.float32), groups, axis=1)
    values *= np.take(np.asarray(parts["scales"][:, slice(*rows)].T, np.float32), groups, axis=1)
    return values


def awq(parts: Parts, rows: Range, columns: Range, *, group: int) -> np.ndarray:
    """AutoAWQ's GEMM layout: eight outputs of an input lie in an int32 word of `qweight`.

    Args:
      parts: `qweight` [in out/8], `qzeros` [groups out/8], `scales` [groups out].
      group: inputs of a group.
    """
    first, last = rows[0] // 8, -(-rows[1] // 8)

    def outputs(words: np.ndarray) -> np.ndarray:
        nibbles = unpack(words[:, first:last], AWQ_BITS, 8 * (last - first)).reshape(len(words), -1, 8)
        codes = nibbles[..., AWQ_ORDER].reshape(len(words), -1)
        return codes[:, rows[0] - 8 * first :][:, : rows[1] - rows[0]].T.astype(np.float32)

    groups = _groups({}, columns, group)
    values = outputs(parts["qweight"][slice(*columns)])
    values -= np.take(outputs(parts["qzeros"]), groups, axis=1)
    values *= np.take(np.asarray(parts["scales"][:, slice(*rows)].T, np.float32), groups, axis=1)
    return values


def _groups(parts: Parts, columns: Range, size: int) -> np.ndarray:
    """The group of each wanted column."""
    if "index" in parts:
        return np.asarray(parts["index"].reshape(-1)[slice(*columns)], np.int64)
    return blocks_of(columns, size)


def _scaled(values: np.ndarray, parts: Parts, rows: Range, columns: Range, scale: str, block: tuple[int, int]
            ) -> np.ndarray:  # fmt: skip
    """`values` less what stands for zero, times their scales, in place."""
    own, groups = blocks_of(rows, block[0]), _groups(parts, columns, block[1])
    if "zero" in parts:
        values -= spread(parts["zero"], own, groups)
    scales = parts["scale"]
    if scale in BYTES:
        scales = BYTES[scale][scales.view(np.uint8)]
    if "global" in parts:
        scales = np.asarray(scales, np.float32) / np.asarray(parts["global"].reshape(()), np.float32)
    values *= spread(scales, own, groups)
    return values

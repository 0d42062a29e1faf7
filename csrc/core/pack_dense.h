// Codes of 1, 2, 4 or 8 bits side by side, the first in the lowest bits of a byte: the layout of ONNX
// (MatMulNBits, INT4, UINT4, INT2, UINT2) and of OpenVINO (u4, i4, u2). Values are not touched: `add` moves
// the codes to the range of the container, modulo 2^bits (8 turns -8..7 into 0..15; 0 keeps two's complement).
#pragma once

#include <cstdint>

namespace phiquant {

// Bytes of a row of `cols` codes; the last byte is filled up with zeros.
constexpr int64_t dense_bytes(int64_t cols, int bits) { return (cols * bits + 7) / 8; }

// codes [rows, cols] of a byte each; out [rows, dense_bytes(cols, bits)]: every row begins at a byte.
void pack_dense(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint8_t add, uint8_t* out);

// The same codes as columns: code [r, c] becomes element c * width + first + r of the flat array `out`, which has
// dense_bytes(cols * width, bits) bytes, all zero where these codes go. So the rows of a matrix [width, cols] may
// come in pieces, `first` the row at which a piece begins, and give the packed matrix [cols, width].
void pack_columns(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint8_t add, int64_t first, int64_t width,
                  uint8_t* out);

}  // namespace phiquant

// 32-bit integers in AVX-512 vectors, and dot products of bytes. For level files alone (see vec_avx512.h).
#pragma once

#include <cstring>

#include "core/vec_avx512.h"

namespace phiquant {
namespace {

struct IntAvx512 : Avx512 {
  using I = __m512i;
  static constexpr int kRows = 8;    // a tile of sums in registers: rows,
  static constexpr int kPanels = 2;  // and panels of 16 columns

  using Avx512::add, Avx512::sub, Avx512::max, Avx512::min, Avx512::set1, Avx512::load, Avx512::store;
  static I zero() { return _mm512_setzero_si512(); }
  static I set1(int32_t v) { return _mm512_set1_epi32(v); }
  static I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static void store_bytes(uint8_t* p, I v) {  // the low byte of each lane
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I mul_low(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static I min(I a, I b) { return _mm512_min_epi32(a, b); }
  static I shift_left(I v, I n) { return _mm512_sllv_epi32(v, n); }
  static I shift_right(I v, I n) { return _mm512_srav_epi32(v, n); }
  static I and_(I a, I b) { return _mm512_and_si512(a, b); }
  // a + 1 where x > y
  static I add_one_where_greater(I a, I x, I y) {
    return _mm512_mask_add_epi32(a, _mm512_cmpgt_epi32_mask(x, y), a, set1(1));
  }
  static I doubling_high(I a, I b) {
    const __m512i half = _mm512_set1_epi64(int64_t{1} << 30);
    const __m512i even = _mm512_add_epi64(_mm512_mul_epi32(a, b), half);
    const __m512i odd = _mm512_add_epi64(_mm512_mul_epi32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32)), half);
    return _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 31), _mm512_slli_epi64(odd, 1));
  }

  // Bytes widened to 16 bits: those at even places of each quad, and those at odd.
  struct Quads {
    I even, odd;
  };
  static Quads weights(const int8_t* p) {
    const __m512i v = _mm512_loadu_si512(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8), _mm512_srai_epi16(v, 8)};
  }
  static Quads broadcast(int32_t quad) {
    const __m512i v = _mm512_set1_epi32(quad);
    return {_mm512_and_si512(v, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(v, 8)};
  }
  static I dot(I sum, Quads x, Quads w) {
    return add(sum, add(_mm512_madd_epi16(x.even, w.even), _mm512_madd_epi16(x.odd, w.odd)));
  }
};

#ifdef __AVX512VNNI__
struct IntAvx512Vnni : IntAvx512 {
  static constexpr int kRows = 6;
  static constexpr int kPanels = 4;

  static I weights(const int8_t* p) { return _mm512_loadu_si512(p); }
  static I broadcast(int32_t quad) { return _mm512_set1_epi32(quad); }
  static I dot(I sum, I x, I w) { return _mm512_dpbusd_epi32(sum, x, w); }  // does not saturate
};
#endif

}  // namespace
}  // namespace phiquant

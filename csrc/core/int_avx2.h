// 32-bit integers in AVX2 vectors, and dot products of bytes. For level files alone (see vec_avx512.h).
#pragma once

#include <cstring>

#include "core/vec_avx2.h"

namespace phiquant {
namespace {

struct IntAvx2 : Avx2 {
  using I = __m256i;
  static constexpr int kRows = 4;    // a tile of sums in registers: rows,
  static constexpr int kPanels = 1;  // and panels of 16 columns

  using Avx2::add, Avx2::sub, Avx2::max, Avx2::min, Avx2::set1, Avx2::load, Avx2::store;
  static I zero() { return _mm256_setzero_si256(); }
  static I set1(int32_t v) { return _mm256_set1_epi32(v); }
  static I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static void store_bytes(uint8_t* p, I v) {  // the low byte of each lane
    const __m256i low = _mm256_and_si256(v, set1(0xff));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0xd8);
    const __m128i half = _mm256_castsi256_si128(words);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(half, half));
  }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I mul_low(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static I min(I a, I b) { return _mm256_min_epi32(a, b); }
  static I shift_left(I v, I n) { return _mm256_sllv_epi32(v, n); }
  static I shift_right(I v, I n) { return _mm256_srav_epi32(v, n); }
  static I and_(I a, I b) { return _mm256_and_si256(a, b); }
  // a + 1 where x > y
  static I add_one_where_greater(I a, I x, I y) { return _mm256_sub_epi32(a, _mm256_cmpgt_epi32(x, y)); }
  static I doubling_high(I a, I b) {
    const __m256i half = _mm256_set1_epi64x(int64_t{1} << 30);
    const __m256i even = _mm256_add_epi64(_mm256_mul_epi32(a, b), half);
    const __m256i odd = _mm256_add_epi64(_mm256_mul_epi32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32)), half);
    return _mm256_blend_epi32(_mm256_srli_epi64(even, 31), _mm256_slli_epi64(odd, 1), 0xaa);
  }

  // vpmaddubsw would saturate at 16 bits, so bytes are widened: those at even places of each quad, and those at odd.
  struct Quads {
    I even, odd;
  };
  static Quads weights(const int8_t* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
  }
  static Quads broadcast(int32_t quad) {
    const __m256i v = _mm256_set1_epi32(quad);
    return {_mm256_and_si256(v, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(v, 8)};
  }
  static I dot(I sum, Quads x, Quads w) {
    return add(sum, add(_mm256_madd_epi16(x.even, w.even), _mm256_madd_epi16(x.odd, w.odd)));
  }
};

}  // namespace
}  // namespace phiquant

// AVX2 and F16C: 8 floats a vector. For level files alone (see vec_avx512.h).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/types.h"

namespace phiquant {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  using Mask = __m256;
  static constexpr int64_t width = 8;

  static F set1(float v) { return _mm256_set1_ps(v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static Mask less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Mask less_equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
  static bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
  static bool any_nan(F a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
  static F select(Mask m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
  static F power_of_two(F v) { return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000))); }
  static F round_f16(F v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  static F round_bf16(F v) {
    bf16 bits[width];
    store(bits, v);
    return load(bits);
  }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static F load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static void store(bf16* p, F v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(u, bias), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(_mm256_blendv_epi8(high, quiet, nan)));
  }
  static void store(f16* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static void store_codes(int8_t* p, F q) {
    // The low byte of each lane: as unsigned values the packs below do not saturate.
    const __m256i low = _mm256_and_si256(_mm256_cvtps_epi32(q), _mm256_set1_epi32(0xff));
    const __m128i words = narrow(low);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static F load_codes(const int8_t* p, bool code_signed) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(code_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
  }

  // The bins t, truncated, as 16 bits; what is negative or beyond goes to bin `bins`.
  static void store_bins(uint16_t* p, F t, int bins) {
    store_u16(p, _mm256_min_epu32(_mm256_cvttps_epi32(t), _mm256_set1_epi32(bins)));
  }
  // bins + trunc(t), one less if t has its sign bit set, as 16 bits; what is not in 0 .. 2 bins - 1 goes to bin 2 bins.
  static void store_signed_bins(uint16_t* p, F t, int bins) {
    const __m256i sign = _mm256_srai_epi32(_mm256_castps_si256(t), 31);
    const __m256i place = _mm256_add_epi32(_mm256_add_epi32(_mm256_cvttps_epi32(t), sign), _mm256_set1_epi32(bins));
    store_u16(p, _mm256_min_epu32(place, _mm256_set1_epi32(2 * bins)));
  }

  static I load_bytes(const int8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_codes(int8_t* p, I q) {
    const __m128i words = narrow(_mm256_and_si256(q, _mm256_set1_epi32(0xff)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }

  static I set1i(int v) { return _mm256_set1_epi32(v); }
  static I bits(F v) { return _mm256_castps_si256(v); }
  static F floats(I v) { return _mm256_castsi256_ps(v); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I min(I a, I b) { return _mm256_min_epi32(a, b); }
  static F bit_and(F a, F b) { return _mm256_and_ps(a, b); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
  static I shift_left(I v, int n) { return _mm256_sll_epi32(v, _mm_cvtsi32_si128(n)); }
  static I shift_right(I v, int n) { return _mm256_srl_epi32(v, _mm_cvtsi32_si128(n)); }
  // v with the sign of s
  static F copy_sign(F v, F s) {
    const F sign = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(sign, v), _mm256_and_ps(sign, s));
  }
  // n + 1 where m, else n
  static I count(I n, Mask m) { return _mm256_sub_epi32(n, bits(m)); }
  static int64_t count(Mask m) { return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(m))); }
  // table[i mod 2^kBits], kBits 1 to 8; the table has at least 16 floats, and repeats if kBits < 4
  template <int kBits>
  [[gnu::always_inline]] static F lookup(const float* table, I i) {
    if constexpr (kBits <= 4) {
      const F low = _mm256_permutevar8x32_ps(load(table), i);
      const F high = _mm256_permutevar8x32_ps(load(table + 8), i);
      return _mm256_blendv_ps(low, high, floats(_mm256_slli_epi32(i, 28)));
    } else {
      return _mm256_i32gather_ps(table, _mm256_and_si256(i, _mm256_set1_epi32((1 << kBits) - 1)), 4);
    }
  }
  template <int kBits>
  [[gnu::always_inline]] static F lookup(const float* table, I i, const Mask*) {
    return lookup<kBits>(table, i);
  }

  // v where lo <= t <= hi, else 0
  static F select_in_range(F t, F lo, F hi, F v) {
    return _mm256_and_ps(_mm256_and_ps(_mm256_cmp_ps(t, lo, _CMP_GE_OQ), _mm256_cmp_ps(t, hi, _CMP_LE_OQ)), v);
  }
  static F first_lanes(F v, int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
    return _mm256_and_ps(_mm256_castsi256_ps(keep), v);
  }

  static F bits(uint32_t b) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(b))); }
  static F bit_or(F a, F b) { return _mm256_or_ps(a, b); }

  // Value j of vector i becomes value i of vector j: within each half of the vectors, then of halves.
  static void transpose(F* v) {
    F t[width];
    for (int r = 0; r < 8; r += 4) {
      const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[r], v[r + 1]));
      const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[r], v[r + 1]));
      const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[r + 2], v[r + 3]));
      const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[r + 2], v[r + 3]));
      t[r] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
      t[r + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
      t[r + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
      t[r + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
    }
    for (int c = 0; c < 4; ++c) {
      v[c] = _mm256_permute2f128_ps(t[c], t[4 + c], 0x20);
      v[4 + c] = _mm256_permute2f128_ps(t[c], t[4 + c], 0x31);
    }
  }

  // Smallest lane of `low` and largest of `high`, folded together with -low in the upper half.
  static void horizontal(F low, F high, float& lo, float& hi) {
    const __m256 n = _mm256_xor_ps(low, _mm256_set1_ps(-0.0f));
    __m256 m = _mm256_max_ps(_mm256_permute2f128_ps(high, n, 0x20), _mm256_permute2f128_ps(high, n, 0x31));
    m = _mm256_max_ps(m, _mm256_permute_ps(m, 0x4e));
    m = _mm256_max_ps(m, _mm256_permute_ps(m, 0xb1));
    hi = _mm256_cvtss_f32(m);
    lo = -_mm_cvtss_f32(_mm256_extractf128_ps(m, 1));
  }

 private:
  static void store_u16(uint16_t* p, __m256i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v)); }
  // Eight 32-bit lanes holding values below 2^16, as eight 16-bit lanes in order.
  static __m128i narrow(__m256i v) {
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0xd8));
  }
};

}  // namespace
}  // namespace phiquant

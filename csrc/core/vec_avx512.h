// AVX-512 (F, BW, DQ, VL): 16 floats a vector. For level files alone: each is compiled with its level's flags,
// and the anonymous namespace keeps what is compiled here from standing in for another level's.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/types.h"

namespace phiquant {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using Mask = __mmask16;
  static constexpr int64_t width = 16;

  static F set1(float v) { return _mm512_set1_ps(v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static Mask less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask less_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static bool any(Mask m) { return m != 0; }
  static bool any_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
  static F select(Mask m, F a, F b) { return _mm512_mask_mov_ps(b, m, a); }
  static F power_of_two(F v) { return _mm512_and_ps(v, _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000))); }
  static F round_f16(F v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  static F round_bf16(F v) {
    bf16 bits[width];
    store(bits, v);
    return load(bits);
  }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  // The first n values; the missing lanes repeat the first.
  static F load_part(const float* p, int64_t n) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(*p), static_cast<__mmask16>((1u << n) - 1u), p);
  }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void store(bf16* p, F v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    __m512i high = _mm512_srli_epi32(_mm512_add_epi32(u, bias), 16);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    high = _mm512_mask_mov_epi32(high, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
  }
  static void store(f16* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static void store_codes(int8_t* p, F q) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(q)));
  }
  static F load_codes(const int8_t* p, bool code_signed) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(code_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
  }

  // The bins t, truncated, as 16 bits; what is negative or beyond goes to bin `bins`.
  static void store_bins(uint16_t* p, F t, int bins) {
    store_u16(p, _mm512_min_epu32(_mm512_cvttps_epi32(t), _mm512_set1_epi32(bins)));
  }
  // bins + trunc(t), one less if t has its sign bit set, as 16 bits; what is not in 0 .. 2 bins - 1 goes to bin 2 bins.
  static void store_signed_bins(uint16_t* p, F t, int bins) {
    const __m512i sign = _mm512_srai_epi32(_mm512_castps_si512(t), 31);
    const __m512i place = _mm512_add_epi32(_mm512_add_epi32(_mm512_cvttps_epi32(t), sign), _mm512_set1_epi32(bins));
    store_u16(p, _mm512_min_epu32(place, _mm512_set1_epi32(2 * bins)));
  }

  static I load_bytes(const int8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_codes(int8_t* p, I q) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(q)); }

  static I set1i(int v) { return _mm512_set1_epi32(v); }
  static I bits(F v) { return _mm512_castps_si512(v); }
  static F floats(I v) { return _mm512_castsi512_ps(v); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I min(I a, I b) { return _mm512_min_epi32(a, b); }
  static F bit_and(F a, F b) { return _mm512_and_ps(a, b); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  static I shift_left(I v, int n) { return _mm512_sll_epi32(v, _mm_cvtsi32_si128(n)); }
  static I shift_right(I v, int n) { return _mm512_srl_epi32(v, _mm_cvtsi32_si128(n)); }
  // v with the sign of s
  static F copy_sign(F v, F s) {
    const I sign = _mm512_set1_epi32(INT32_MIN);
    return floats(_mm512_ternarylogic_epi32(sign, bits(s), bits(v), 0xca));
  }
  // n + 1 where m, else n
  static I count(I n, Mask m) { return _mm512_mask_sub_epi32(n, m, n, _mm512_set1_epi32(-1)); }
  static int64_t count(Mask m) { return __builtin_popcount(m); }
  // table[i mod 2^kBits], kBits 1 to 8; the table has at least 16 floats, and repeats if kBits < 4
  template <int kBits>
  [[gnu::always_inline]] static F lookup(const float* table, I i) {
    if constexpr (kBits <= 4) {
      return _mm512_permutexvar_ps(i, load(table));
    } else if constexpr (kBits == 5) {
      return _mm512_permutex2var_ps(load(table), i, load(table + 16));
    } else {
      constexpr int kHalf = 1 << (kBits - 1);
      const Mask upper = _mm512_test_epi32_mask(i, _mm512_set1_epi32(kHalf));
      return select(upper, lookup<kBits - 1>(table + kHalf, i), lookup<kBits - 1>(table, i));
    }
  }

  // The same where the decisions that made the bits of i, from bit kBits - 1 down, are known.
  template <int kBits>
  [[gnu::always_inline]] static F lookup(const float* table, I i, const Mask* bits) {
    if constexpr (kBits <= 5) {
      return lookup<kBits>(table, i);
    } else {
      constexpr int kHalf = 1 << (kBits - 1);
      return select(*bits, lookup<kBits - 1>(table + kHalf, i, bits + 1), lookup<kBits - 1>(table, i, bits + 1));
    }
  }

  // v where lo <= t <= hi, else 0
  static F select_in_range(F t, F lo, F hi, F v) {
    const __mmask16 inside = _mm512_cmp_ps_mask(t, lo, _CMP_GE_OQ) & _mm512_cmp_ps_mask(t, hi, _CMP_LE_OQ);
    return _mm512_maskz_mov_ps(inside, v);
  }
  static F first_lanes(F v, int64_t n) { return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << n) - 1u), v); }

  static F bits(uint32_t b) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(b))); }
  static F bit_or(F a, F b) { return _mm512_or_ps(a, b); }

  // Value j of vector i becomes value i of vector j: within each quarter of the vectors, then of quarters.
  static void transpose(F* v) {
    F t[width];
    for (int r = 0; r < 16; r += 4) {
      const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[r], v[r + 1]));
      const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[r], v[r + 1]));
      const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[r + 2], v[r + 3]));
      const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[r + 2], v[r + 3]));
      t[r] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
      t[r + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
      t[r + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
      t[r + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    for (int c = 0; c < 4; ++c) {
      const F a = _mm512_shuffle_f32x4(t[c], t[4 + c], 0x88);
      const F b = _mm512_shuffle_f32x4(t[c], t[4 + c], 0xdd);
      const F d = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0x88);
      const F e = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0xdd);
      v[c] = _mm512_shuffle_f32x4(a, d, 0x88);
      v[4 + c] = _mm512_shuffle_f32x4(b, e, 0x88);
      v[8 + c] = _mm512_shuffle_f32x4(a, d, 0xdd);
      v[12 + c] = _mm512_shuffle_f32x4(b, e, 0xdd);
    }
  }

  // `horizontal` of four blocks at once, with half the shuffles.
  static void horizontal4(const F* low, const F* high, float* lo, float* hi) {
    __m256 m[4];
    for (int i = 0; i < 4; ++i) {
      const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(high[i]), _mm512_extractf32x8_ps(high[i], 1));
      const __m256 l = _mm256_min_ps(_mm512_castps512_ps256(low[i]), _mm512_extractf32x8_ps(low[i], 1));
      const __m256 n = _mm256_xor_ps(l, _mm256_set1_ps(-0.0f));
      m[i] = _mm256_max_ps(_mm256_permute2f128_ps(h, n, 0x20), _mm256_permute2f128_ps(h, n, 0x31));
    }
    const __m256 a = _mm256_max_ps(_mm256_unpacklo_ps(m[0], m[1]), _mm256_unpackhi_ps(m[0], m[1]));
    const __m256 b = _mm256_max_ps(_mm256_unpacklo_ps(m[2], m[3]), _mm256_unpackhi_ps(m[2], m[3]));
    const __m256 r = _mm256_max_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    _mm_storeu_ps(hi, _mm256_castps256_ps128(r));
    _mm_storeu_ps(lo, _mm_xor_ps(_mm256_extractf128_ps(r, 1), _mm_set1_ps(-0.0f)));
  }

  // Smallest lane of `low` and largest of `high`. Both are folded together, -low in the upper half:
  // for groups of 32 these shuffles are most of the work.
  static void horizontal(F low, F high, float& lo, float& hi) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(high), _mm512_extractf32x8_ps(high, 1));
    const __m256 l = _mm256_min_ps(_mm512_castps512_ps256(low), _mm512_extractf32x8_ps(low, 1));
    const __m256 n = _mm256_xor_ps(l, sign);
    // [h0..3 | n0..3] and [h4..7 | n4..7]
    __m256 m = _mm256_max_ps(_mm256_permute2f128_ps(h, n, 0x20), _mm256_permute2f128_ps(h, n, 0x31));
    m = _mm256_max_ps(m, _mm256_permute_ps(m, 0x4e));
    m = _mm256_max_ps(m, _mm256_permute_ps(m, 0xb1));
    hi = _mm256_cvtss_f32(m);
    lo = -_mm_cvtss_f32(_mm256_extractf128_ps(m, 1));
  }

 private:
  static void store_u16(uint16_t* p, __m512i v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
};

}  // namespace
}  // namespace phiquant

// x^e over lanes V by polynomials, to about 3e-6 of its value for the exponents of hqq.h: no call, and the same bits
// at every CPU level. V gives, beyond what range.inl asks: bits, floats, set1i, add, bit_and, bit_or and shifts.

#include <cfloat>
#include <initializer_list>

namespace phiquant {
namespace {

template <class V>
struct Power {
  using F = typename V::F;
  using I = typename V::I;

  static F polynomial(F x, std::initializer_list<float> coefficients) {
    F sum = V::set1(0.0f);
    bool first = true;
    for (const float c : coefficients) {  // from the highest power down
      sum = first ? V::set1(c) : V::add(V::mul(sum, x), V::set1(c));
      first = false;
    }
    return sum;
  }

  // x normal and above 0: x = 2^n m, m in [sqrt(1/2), sqrt(2)).
  [[gnu::always_inline]] static F log2(F x) {
    constexpr int kRoot = 0x3f3504f3, kOne = 0x3f800000;  // the bits of sqrt(1/2) and of 1
    const I i = V::add(V::bits(x), V::set1i(kOne - kRoot));
    const F m = V::floats(V::add(V::bit_and(i, V::set1i(0x7fffff)), V::set1i(kRoot)));
    const F n = V::sub(V::floats(V::bit_or(V::shift_right(i, 23), V::set1i(0x4b000000))), V::set1(8388608.0f + 127.0f));
    const F f = V::sub(m, V::set1(1.0f));
    const F log = V::mul(f, polynomial(f, {0x1.5f7b8ep-3f, -0x1.13c878p-2f, 0x1.2ecbeep-2f, -0x1.6fff24p-2f,
                                           0x1.ec296cp-2f, -0x1.715690p-1f, 0x1.71548ep+0f}));
    return V::add(n, log);
  }

  // 2^t for |t| < 126: the integer part goes to the exponent.
  [[gnu::always_inline]] static F exp2(F t) {
    const F shifted = V::add(t, V::set1(12582912.0f));  // 1.5 * 2^23: rounds, and leaves the integer in the low bits
    const F f = V::sub(t, V::sub(shifted, V::set1(12582912.0f)));
    const F part = polynomial(
        f, {0x1.5c08dcp-10f, 0x1.3d0c52p-7f, 0x1.c6b6e6p-5f, 0x1.ebf918p-3f, 0x1.62e428p-1f, 0x1.000002p+0f});
    return V::floats(V::add(V::bits(part), V::shift_left(V::bits(shifted), 23)));
  }

  // x^e for x from FLT_MIN on and -1 <= e <= 0.
  [[gnu::always_inline]] static F raise(F x, F e) { return exp2(V::mul(e, log2(V::max(x, V::set1(FLT_MIN))))); }
};

}  // namespace
}  // namespace phiquant

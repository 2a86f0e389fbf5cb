// Operations on registers alone: moves, integers, predicates.
#pragma once

#include "machine.h"

template <class T, class F>
inline void unary(const Step& s, F f) {
  T* d = s.result<T>(0);
  const T* a = s.source<T>(0);
  for_lanes(s.mask, [&](int lane) { d[lane] = T(f(a[lane])); });
}

template <class T, class F>
inline void binary(const Step& s, F f) {
  T* d = s.result<T>(0);
  const T *a = s.source<T>(0), *b = s.source<T>(1);
  for_lanes(s.mask, [&](int lane) { d[lane] = T(f(a[lane], b[lane])); });
}

template <class T, class F>
inline void ternary(const Step& s, F f) {
  T* d = s.result<T>(0);
  const T *a = s.source<T>(0), *b = s.source<T>(1), *c = s.source<T>(2);
  for_lanes(s.mask, [&](int lane) { d[lane] = T(f(a[lane], b[lane], c[lane])); });
}

template <class Wide, class T>
inline void multiply_wide(const Step& s) {
  Wide* d = s.result<Wide>(0);
  const T *a = s.source<T>(0), *b = s.source<T>(1);
  for_lanes(s.mask, [&](int lane) { d[lane] = Wide(Wide(a[lane]) * Wide(b[lane])); });
}

template <class Wide, class T>
inline void multiply_add_wide(const Step& s) {
  Wide* d = s.result<Wide>(0);
  const T *a = s.source<T>(0), *b = s.source<T>(1);
  const Wide* c = s.source<Wide>(2);
  for_lanes(s.mask, [&](int lane) { d[lane] = Wide(Wide(a[lane]) * Wide(b[lane]) + c[lane]); });
}

// By a count of 32 bits; all bits are shifted out by one that is too large.
template <class T, class F>
inline void shift(const Step& s, F f) {
  T* d = s.result<T>(0);
  const T* a = s.source<T>(0);
  const u32* count = s.source<u32>(1);
  for_lanes(s.mask, [&](int lane) {
    bool over = count[lane] >= sizeof(T) * 8;
    d[lane] = over ? T(a[lane] < T(0) ? -1 : 0) : T(f(a[lane], count[lane]));
  });
}

template <class T>
inline void select(const Step& s) {
  T* d = s.result<T>(0);
  const T *a = s.source<T>(0), *b = s.source<T>(1);
  u32 p = *s.source<u32>(2);
  for_lanes(s.mask, [&](int lane) { d[lane] = p >> lane & 1 ? a[lane] : b[lane]; });
}

template <class T>
inline void extract_bits(const Step& s, bool is_signed) {
  T* d = s.result<T>(0);
  const T* a = s.source<T>(0);
  const u32 *from = s.source<u32>(1), *count = s.source<u32>(2);
  constexpr u32 bits = sizeof(T) * 8;
  for_lanes(s.mask, [&](int lane) {
    u32 position = from[lane] & 255, length = count[lane] & 255;
    u32 sign_at = std::min(position + length - 1, bits - 1);
    T sign = is_signed && length && (a[lane] >> sign_at & 1) ? T(-1) : T(0);
    T kept = length >= bits ? T(-1) : T((T(1) << length) - 1);
    T value = position >= bits ? sign : T(a[lane] >> position);
    // Beyond the register's end, too, stands the sign.
    T present = position >= bits ? T(0) : T(T(-1) >> position);
    d[lane] = length ? T((((value & present) | (sign & ~present)) & kept) | (sign & ~kept)) : T(0);
  });
}

inline void insert_bits(const Step& s) {
  u32* d = s.result<u32>(0);
  const u32 *a = s.source<u32>(0), *b = s.source<u32>(1), *from = s.source<u32>(2), *count = s.source<u32>(3);
  for_lanes(s.mask, [&](int lane) {
    u32 position = from[lane] & 255, length = count[lane] & 255;
    u64 ones = length >= 32 ? 0xffffffffull : (1ull << length) - 1;
    u64 place = position >= 32 ? 0 : ones << position, value = position >= 32 ? 0 : u64(a[lane]) << position;
    d[lane] = u32((b[lane] & ~place) | (value & place));
  });
}

inline u32 permuted(u32 a, u32 b, u32 selector) {
  u64 bytes = a | u64(b) << 32;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 choice = selector >> (4 * i) & 15;
    u32 byte = bytes >> (8 * (choice & 7)) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

inline u32 looked_up(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (u32 i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

inline u32 reversed(u32 x) {
  u32 result = 0;
  for (int i = 0; i < 32; i++) result |= (x >> i & 1) << (31 - i);
  return result;
}

enum Comparison { EQ, NE, LT, LE, GT, GE, ORDERED = 12, UNORDERED = 13 };  // + 6: or one of the two is a NaN

template <class T>
inline u32 compared(int how, const T* a, const T* b) {
  u32 result = 0, nan = 0;
  for (int lane = 0; lane < 32; lane++) {
    T x = a[lane], y = b[lane];
    bool holds = false;
    switch (how >= ORDERED ? how : how % 6) {
      case EQ: holds = x == y; break;
      case NE: holds = x != y; break;
      case LT: holds = x < y; break;
      case LE: holds = x <= y; break;
      case GT: holds = x > y; break;
      case GE: holds = x >= y; break;
    }
    result |= u32(holds) << lane;
    nan |= u32(x != x || y != y) << lane;
  }
  if (how == ORDERED) return ~nan;
  if (how == UNORDERED) return nan;
  return how < 6 ? result & ~nan : result | nan;
}

// What a comparison gave, combined with a third operand, and its opposite where that is wanted too.
inline void set_compared(const Step& s, u32 holds) {
  enum { NONE, AND, OR, XOR };
  u32 opposite = ~holds;
  if (s.inst.extra != NONE) {
    u32 other = *s.source<u32>(2);
    if (s.inst.immediate) other = ~other;
    for (u32* value : {&holds, &opposite})
      *value = s.inst.extra == AND ? *value & other : s.inst.extra == OR ? *value | other : *value ^ other;
  }
  s.set_predicate(0, holds);
  if (s.inst.results > 1) s.set_predicate(1, opposite);
}

template <class T>
inline void compare(const Step& s) {
  set_compared(s, compared(s.inst.mode, s.source<T>(0), s.source<T>(1)));
}

inline void compare_16(const Step& s, bool bfloat) {
  float values[2][32];
  for (int i = 0; i < 2; i++)
    for (int lane = 0; lane < 32; lane++) values[i][lane] = float_of_16(s.source<u16>(i)[lane], bfloat);
  set_compared(s, compared(s.inst.mode, values[0], values[1]));
}

// Several registers of Part as one of Whole; `used` bits of each.
template <class Whole, class Part>
inline void pack(const Step& s, int used) {
  Whole* d = s.result<Whole>(0);
  Whole packed[32] = {};
  for (int i = 0; i < s.inst.sources; i++) {
    const Part* a = s.source<Part>(i);
    for (int lane = 0; lane < 32; lane++) packed[lane] |= (Whole(a[lane]) & Whole((1ull << used) - 1)) << (used * i);
  }
  for_lanes(s.mask, [&](int lane) { d[lane] = packed[lane]; });
}

template <class Whole, class Part>
inline void unpack(const Step& s, int used) {
  Whole whole[32];
  memcpy(whole, s.source<Whole>(0), sizeof whole);
  for (int i = 0; i < s.inst.results; i++) {
    Part* d = s.result<Part>(i);
    for_lanes(s.mask, [&](int lane) { d[lane] = Part(whole[lane] >> (used * i) & Whole((1ull << used) - 1)); });
  }
}

template <class T>
inline u32 zero_divisors(const Step& s) {
  u32 zeros = 0;
  for_lanes(s.mask, [&](int lane) { zeros |= u32(s.source<T>(1)[lane] == 0) << lane; });
  return zeros;
}

inline bool Machine::arithmetic(const Step& s) {
  auto divide = [&](auto zero, auto f) {
    using T = decltype(zero);
    if (u32 zeros = zero_divisors<T>(s))
      find("FAULT", "integer division by zero" + where(s.warp, __builtin_ctz(zeros)));
    binary<T>(s, [&](T x, T y) { return y == 0 ? T(-1) : T(f(x, y)); });
  };
#define CASE(name, ...) \
  case op_##name:       \
    __VA_ARGS__;        \
    return true;
#define UNARY(name, T, expression) CASE(name, unary<T>(s, [](T x) { return expression; }))
#define BINARY(name, T, expression) CASE(name, binary<T>(s, [](T x, T y) { return expression; }))
#define EACH_UNARY(name, expression)                                               \
  UNARY(name##16, u16, expression) UNARY(name##32, u32, expression) UNARY(name##64, u64, expression)
#define EACH_BINARY(name, expression)                                              \
  BINARY(name##16, u16, expression) BINARY(name##32, u32, expression) BINARY(name##64, u64, expression)
#define EACH_TYPE(M, name, expression)                                             \
  M(name##_u16, u16, expression) M(name##_s16, i16, expression) M(name##_u32, u32, expression) \
  M(name##_s32, i32, expression) M(name##_u64, u64, expression) M(name##_s64, i64, expression)
#define SHIFT(name, T, expression) CASE(name, shift<T>(s, [](T x, u32 y) { return expression; }))
#define DIVIDE(name, T, expression) CASE(name, divide(T(), [](T x, T y) { return expression; }))
#define COMPARE(name, T, unused) CASE(name, compare<T>(s))
  switch (s.inst.op) {
    EACH_UNARY(mov, x)
    CASE(movp, s.set_predicate(0, *s.source<u32>(0)))
    CASE(pack2x16, pack<u32, u16>(s, 16))
    CASE(pack2x32, pack<u64, u32>(s, 32))
    CASE(pack4x16, pack<u64, u16>(s, 16))
    CASE(pack4x8, pack<u32, u16>(s, 8))
    CASE(unpack2x16, unpack<u32, u16>(s, 16))
    CASE(unpack2x32, unpack<u64, u32>(s, 32))
    CASE(unpack4x16, unpack<u64, u16>(s, 16))
    CASE(unpack4x8, unpack<u32, u16>(s, 8))

    EACH_BINARY(add, x + y)
    EACH_BINARY(sub, x - y)
    BINARY(add16x2, u32, ((x + y) & 0xffff) | (((x >> 16) + (y >> 16)) << 16))
    EACH_BINARY(mullo, u64(x) * y)
    BINARY(mulhi_u16, u16, u32(x) * y >> 16)
    BINARY(mulhi_s16, i16, i32(x) * y >> 16)
    BINARY(mulhi_u32, u32, u64(x) * y >> 32)
    BINARY(mulhi_s32, i32, i64(x) * y >> 32)
    BINARY(mulhi_u64, u64, (unsigned __int128)(x)*y >> 64)
    BINARY(mulhi_s64, i64, (__int128)(x)*y >> 64)
    CASE(mulwide_u16, multiply_wide<u32, u16>(s))
    CASE(mulwide_s16, multiply_wide<i32, i16>(s))
    CASE(mulwide_u32, multiply_wide<u64, u32>(s))
    CASE(mulwide_s32, multiply_wide<i64, i32>(s))
    CASE(madlo16, ternary<u16>(s, [](u32 x, u32 y, u32 z) { return x * y + z; }))
    CASE(madlo32, ternary<u32>(s, [](u32 x, u32 y, u32 z) { return x * y + z; }))
    CASE(madlo64, ternary<u64>(s, [](u64 x, u64 y, u64 z) { return x * y + z; }))
    CASE(madwide_u16, multiply_add_wide<u32, u16>(s))
    CASE(madwide_s16, multiply_add_wide<i32, i16>(s))
    CASE(madwide_u32, multiply_add_wide<u64, u32>(s))
    CASE(madwide_s32, multiply_add_wide<i64, i32>(s))

    EACH_BINARY(and, x & y)
    EACH_BINARY(or, x | y)
    EACH_BINARY(xor, x ^ y)
    EACH_UNARY(not, ~x)
    CASE(andp, s.set_predicate(0, *s.source<u32>(0) & *s.source<u32>(1)))
    CASE(orp, s.set_predicate(0, *s.source<u32>(0) | *s.source<u32>(1)))
    CASE(xorp, s.set_predicate(0, *s.source<u32>(0) ^ *s.source<u32>(1)))
    CASE(notp, s.set_predicate(0, ~*s.source<u32>(0)))
    SHIFT(shl16, u16, x << y)
    SHIFT(shl32, u32, x << y)
    SHIFT(shl64, u64, x << y)
    EACH_TYPE(SHIFT, shr, x >> y)

    EACH_TYPE(BINARY, min, x < y ? x : y)
    EACH_TYPE(BINARY, max, x > y ? x : y)
    EACH_UNARY(neg, 0 - x)
    UNARY(abs16, i16, x < 0 ? -x : x)
    UNARY(abs32, i32, x < 0 ? i32(0 - u32(x)) : x)
    UNARY(abs64, i64, x < 0 ? i64(0 - u64(x)) : x)
    EACH_TYPE(DIVIDE, div, x / y)
    EACH_TYPE(DIVIDE, rem, x % y)

    CASE(bfe_u32, extract_bits<u32>(s, false))
    CASE(bfe_s32, extract_bits<u32>(s, true))
    CASE(bfe_u64, extract_bits<u64>(s, false))
    CASE(bfe_s64, extract_bits<u64>(s, true))
    CASE(bfi32, insert_bits(s))
    CASE(prmt, ternary<u32>(s, permuted))
    CASE(lop3, ternary<u32>(s, [&](u32 x, u32 y, u32 z) { return looked_up(x, y, z, u32(s.inst.immediate)); }))
    UNARY(popc32, u32, __builtin_popcount(x))
    UNARY(clz32, u32, x ? __builtin_clz(x) : 32)
    UNARY(brev32, u32, reversed(x))
    CASE(shf_l_wrap, ternary<u32>(s, [](u32 x, u32 y, u32 n) { return ((x | u64(y) << 32) << (n & 31)) >> 32; }))
    CASE(shf_r_wrap, ternary<u32>(s, [](u32 x, u32 y, u32 n) { return (x | u64(y) << 32) >> (n & 31); }))
    CASE(selp16, select<u16>(s))
    CASE(selp32, select<u32>(s))
    CASE(selp64, select<u64>(s))
    EACH_TYPE(COMPARE, setp, )
    CASE(setp_f16, compare_16(s, false))
    CASE(setp_bf16, compare_16(s, true))
    CASE(setp_f32, compare<float>(s))
    CASE(setp_f64, compare<double>(s))
  }
  return false;
}

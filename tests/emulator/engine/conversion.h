// Conversions between number formats.
#pragma once

#include <limits>

#include "floating.h"

enum Kind { UNSIGNED, SIGNED, FLOATING };

// A type as cvt names it in `mode` (of the result) and `extra` (of the source).
struct Type {
  explicit Type(i32 code) : kind(Kind(code & 15)), bytes(code >> 4 & 15), bfloat(code & 256), tf32(code & 512) {}
  Kind kind;
  int bytes;
  bool bfloat, tf32;
};

// How cvt rounds, in its immediate.
struct Rounding {
  explicit Rounding(i64 code) : how(code & 7), to_integer(code & 8), saturate(code & 16), flush(code & 32) {}
  enum { NEAREST, TO_ZERO, DOWN, UP };
  int how;
  bool to_integer, saturate, flush;

  double integer(double x) const {
    switch (how) {
      case TO_ZERO: return std::trunc(x);
      case DOWN: return std::floor(x);
      case UP: return std::ceil(x);
      default: return std::nearbyint(x);
    }
  }
};

inline u64 raw_register(const void* registers, int width, int lane) {
  switch (width) {
    case 8: return static_cast<const u64*>(registers)[lane];
    case 4: return static_cast<const u32*>(registers)[lane];
    default: return static_cast<const u16*>(registers)[lane];
  }
}

inline void set_raw_register(void* registers, int width, int lane, u64 value) {
  switch (width) {
    case 8: static_cast<u64*>(registers)[lane] = value; break;
    case 4: static_cast<u32*>(registers)[lane] = u32(value); break;
    default: static_cast<u16*>(registers)[lane] = u16(value);
  }
}

inline u64 sign_extended(u64 x, int bytes) {
  switch (bytes) {
    case 1: return u64(i64(i8(x)));
    case 2: return u64(i64(i16(x)));
    case 4: return u64(i64(i32(x)));
    default: return x;
  }
}

inline u64 zero_extended(u64 x, int bytes) { return bytes == 8 ? x : x & ((1ull << (8 * bytes)) - 1); }

inline double floating_source(const Step& s, const Type& type, int lane) {
  if (type.bytes == 8) return s.source<double>(0)[lane];
  if (type.bytes == 4) return s.source<float>(0)[lane];
  return float_of_16(s.source<u16>(0)[lane], type.bfloat);
}

inline void store_floating(const Step& s, const Type& to, const Rounding& rounding, int lane, double value) {
  if (rounding.to_integer) value = rounding.integer(value);
  if (rounding.saturate) value = value != value ? 0.0 : std::min(1.0, std::max(0.0, value));
  if (to.bytes == 8) {
    s.result<double>(0)[lane] = value;
    return;
  }
  if (to.bytes == 2) {
    s.result<u16>(0)[lane] = to_16(rounded_to_odd(value), to.bfloat);
    return;
  }
  float f = float(value);
  bool away = std::fabs(double(f)) > std::fabs(value);
  if (rounding.how == Rounding::TO_ZERO && !rounding.to_integer && away) f = std::nextafterf(f, 0.0f);
  if (to.tf32) f = float_of(tf32_of(bits_of(f), rounding.how == Rounding::NEAREST));
  s.result<float>(0)[lane] = rounding.flush ? flushed(f) : f;
}

// Towards the nearest value that the type has.
inline u64 integer_of(double x, const Type& to) {
  bool is_signed = to.kind == SIGNED;
  double low = is_signed ? -std::ldexp(1.0, 8 * to.bytes - 1) : 0.0;
  double end = std::ldexp(1.0, 8 * to.bytes - is_signed);
  if (x != x) return 0;
  if (x <= low) return u64(i64(low));
  if (x >= end) return is_signed ? (1ull << (8 * to.bytes - 1)) - 1 : zero_extended(~0ull, to.bytes);
  return is_signed ? u64(i64(x)) : u64(x);
}

inline u64 saturated(i64 x, const Type& to) {
  bool is_signed = to.kind == SIGNED;
  if (to.bytes == 8) return u64(is_signed ? x : std::max<i64>(x, 0));
  i64 low = is_signed ? -(1ll << (8 * to.bytes - 1)) : 0, high = (1ll << (8 * to.bytes - is_signed)) - 1;
  return u64(std::min(high, std::max(low, x)));
}

inline void convert(const Step& s) {
  const Type to(s.inst.mode), from(s.inst.extra);
  const Rounding rounding(s.inst.immediate);
  const int from_width = int(s.inst.immediate2), to_width = s.inst.target;  // of the registers, in bytes
  for_lanes(s.mask, [&](int lane) {
    if (from.kind == FLOATING) {
      double x = floating_source(s, from, lane);
      if (rounding.flush && from.bytes == 4) x = flushed(float(x));
      if (to.kind == FLOATING) return store_floating(s, to, rounding, lane, x);
      u64 value = zero_extended(integer_of(rounding.integer(x), to), to.bytes);
      return set_raw_register(s.result<u8>(0), to_width, lane,
                              to.kind == SIGNED ? sign_extended(value, to.bytes) : value);
    }
    u64 x = zero_extended(raw_register(s.source<u8>(0), from_width, lane), from.bytes);
    if (from.kind == SIGNED) x = sign_extended(x, from.bytes);
    if (to.kind == FLOATING) {
      if (to.bytes == 4) {  // by way of a double, a number of 64 bits would be rounded twice
        s.result<float>(0)[lane] = from.kind == SIGNED ? float(i64(x)) : float(x);
        return;
      }
      return store_floating(s, to, rounding, lane, from.kind == SIGNED ? double(i64(x)) : double(x));
    }
    if (rounding.saturate) x = saturated(i64(x), to);
    x = zero_extended(x, to.bytes);
    set_raw_register(s.result<u8>(0), to_width, lane, to.kind == SIGNED ? sign_extended(x, to.bytes) : x);
  });
}

// Two float32 to a register of two 16-bit numbers, the first to the upper half.
inline void convert_pair(const Step& s, bool bfloat) {
  binary<u32>(
      s, [&](u32 high, u32 low) { return u32(to_16(float_of(high), bfloat)) << 16 | to_16(float_of(low), bfloat); });
}

inline bool Machine::conversion(const Step& s) {
  switch (s.inst.op) {
    CASE(cvt, convert(s))
    CASE(cvt_f16x2, convert_pair(s, false))
    CASE(cvt_bf16x2, convert_pair(s, true))
  }
  return false;
}

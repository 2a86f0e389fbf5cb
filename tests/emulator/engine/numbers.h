// Number formats, in code that needs no special instructions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vocabulary.h"

inline u32 bits_of(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline float float_of_half(u16 half) {
  // The exponent's bias differs by 112; the multiplication also makes numbers of what is subnormal in a half.
  float x = float_of((half & 0x7fffu) << 13) * 0x1p112f;
  u32 bits = bits_of(x);
  if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  return float_of(bits | (half & 0x8000u) << 16);
}

inline u16 half_of(float x) {  // to nearest, ties to even
  u32 bits = bits_of(x), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return u16(sign | 0x7e00);
  if (bits >= 0x477ff000) return u16(sign | 0x7c00);  // from 65520 on
  // A half's subnormals are multiples of 2^-24, as are the floats from 0.5 to 1: the addition rounds to one.
  if (bits < 0x38800000) return u16(sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f)));
  return u16(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

inline float float_of_bfloat(u16 bfloat) { return float_of(u32(bfloat) << 16); }

inline u16 bfloat_of(float x) {  // to nearest, ties to even
  u32 bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline u32 tf32_of(u32 bits, bool nearest) {
  bool finite = (bits & 0x7f800000) != 0x7f800000;
  if (finite && nearest) bits += 0x1000;
  return finite ? bits & ~0x1fffu : bits;
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// The 16-bit formats by number, as instructions name them.
enum Format { HALF, BFLOAT, TF32 };

inline float float_of_16(u16 x, bool bfloat) { return bfloat ? float_of_bfloat(x) : float_of_half(x); }
inline u16 to_16(float x, bool bfloat) { return bfloat ? bfloat_of(x) : half_of(x); }

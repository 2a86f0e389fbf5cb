// Operations on floating-point numbers. What a GPU approximates (ex2, rcp, rsqrt, div.full) is rounded correctly here.
#pragma once

#include "arithmetic.h"

enum { FLUSH = 1, NAN_WINS = 2 };   // in the mode of an operation on float32
enum { BFLOAT16 = 1, PAIRED = 2 };  // in the mode of one on 16 bits

// Of float32 operands, computed wider where f does so. Subnormals of operands and results are flushed if asked for.
template <class F>
inline void unary_float(const Step& s, F f) {
  if (s.inst.mode & FLUSH)
    unary<float>(s, [&](float x) { return flushed(float(f(flushed(x)))); });
  else
    unary<float>(s, f);
}

template <class F>
inline void binary_float(const Step& s, F f) {
  if (s.inst.mode & FLUSH)
    binary<float>(s, [&](float x, float y) { return flushed(f(flushed(x), flushed(y))); });
  else
    binary<float>(s, f);
}

inline float fused(float x, float y, float z) { return __builtin_fmaf(x, y, z); }

inline void multiply_add(const Step& s) {
  if (s.inst.mode & FLUSH)
    ternary<float>(s, [](float x, float y, float z) { return flushed(fused(flushed(x), flushed(y), flushed(z))); });
  else
    ternary<float>(s, fused);
}

// The smallest or largest of two operands, or of three (Blackwell).
inline void extreme(const Step& s, bool largest) {
  const float nan = float_of(0x7fffffff);
  bool flush = s.inst.mode & FLUSH, nan_wins = s.inst.mode & NAN_WINS;
  float result[32];
  memcpy(result, s.source<float>(0), sizeof result);
  for (int i = 1; i < s.inst.sources; i++) {
    const float* other = s.source<float>(i);
    for_lanes(s.mask, [&](int lane) {
      float x = flush ? flushed(result[lane]) : result[lane], y = flush ? flushed(other[lane]) : other[lane];
      if (x != x || y != y)
        result[lane] = nan_wins || (x != x && y != y) ? nan : x != x ? y : x;
      else if (x == y)  // of two zeros the sign decides
        result[lane] = std::signbit(x) == largest ? y : x;
      else
        result[lane] = (x > y) == largest ? x : y;
    });
  }
  float* d = s.result<float>(0);
  for_lanes(s.mask, [&](int lane) { d[lane] = result[lane]; });
}

// Operands of 16 bits, the last one and the result of 32.
inline void mixed(const Step& s) {
  float* d = s.result<float>(0);
  const float* last = s.source<float>(s.inst.sources - 1);
  bool bfloat = s.inst.mode & BFLOAT16;
  for_lanes(s.mask, [&](int lane) {
    float x = float_of_16(s.source<u16>(0)[lane], bfloat), z = last[lane];
    if (s.inst.op == op_mixadd) d[lane] = x + z;
    if (s.inst.op == op_mixsub) d[lane] = x - z;
    if (s.inst.op == op_mixfma) d[lane] = fused(x, float_of_16(s.source<u16>(1)[lane], bfloat), z);
  });
}

// Two float32 in a register of 64 bits.
inline void pairs(const Step& s) {
  bool flush = s.inst.mode & FLUSH;
  for_lanes(s.mask, [&](int lane) {
    float value[3][2] = {}, result[2];
    for (int i = 0; i < std::min(s.inst.sources, 3); i++) memcpy(value[i], s.source<u64>(i) + lane, 8);
    for (int half = 0; half < 2; half++) {
      float v[3];
      for (int i = 0; i < 3; i++) v[i] = flush ? flushed(value[i][half]) : value[i][half];
      float r = 0;
      switch (s.inst.op) {
        case op_fadd2: r = v[0] + v[1]; break;
        case op_fsub2: r = v[0] - v[1]; break;
        case op_fmul2: r = v[0] * v[1]; break;
        case op_ffma2: r = fused(v[0], v[1], v[2]); break;
      }
      result[half] = flush ? flushed(r) : r;
    }
    memcpy(s.result<u64>(0) + lane, result, 8);
  });
}

// A double as a float that keeps, in its last bit, whether anything was cut: rounding once more gives the right result.
inline float rounded_to_odd(double x) {
  float f = float(x);
  if (double(f) == x || x != x) return f;
  u32 bits = bits_of(f);
  if (std::fabs(double(f)) > std::fabs(x)) bits -= 1;
  return float_of(bits | 1);
}

inline double of_sixteen_bits(int op, const float* v) {
  switch (op) {
    case op_hadd: return double(v[0]) + v[1];
    case op_hsub: return double(v[0]) - v[1];
    case op_hmul: return double(v[0]) * v[1];
    case op_hfma: return double(v[0]) * v[1] + v[2];
    case op_hneg: return -v[0];
    case op_habs: return std::fabs(v[0]);
    case op_hmin: return std::fmin(v[0], v[1]);
    default: return std::fmax(v[0], v[1]);
  }
}

inline void sixteen_bits(const Step& s) {
  bool bfloat = s.inst.mode & BFLOAT16, paired = s.inst.mode & PAIRED;
  for (int half = 0; half < (paired ? 2 : 1); half++) {
    for_lanes(s.mask, [&](int lane) {
      float value[3] = {};
      for (int i = 0; i < s.inst.sources; i++) {
        u16 x = paired ? u16(s.source<u32>(i)[lane] >> (16 * half)) : s.source<u16>(i)[lane];
        value[i] = float_of_16(x, bfloat);
      }
      u16 out = to_16(rounded_to_odd(of_sixteen_bits(s.inst.op, value)), bfloat);
      if (!paired) {
        s.result<u16>(0)[lane] = out;
      } else {
        u32& d = s.result<u32>(0)[lane];
        d = half ? (d & 0xffff) | u32(out) << 16 : (d & 0xffff0000) | out;
      }
    });
  }
}

inline bool Machine::floating(const Step& s) {
#define FUNCTION(name, expression) CASE(name, unary_float(s, [](float x) { return expression; }))
#define OF_TWO(name, expression) CASE(name, binary_float(s, [](float x, float y) { return expression; }))
  switch (s.inst.op) {
    OF_TWO(fadd, x + y)
    OF_TWO(fsub, x - y)
    OF_TWO(fmul, x * y)
    OF_TWO(fdiv, x / y)
    CASE(ffma, multiply_add(s))
    CASE(fmin, extreme(s, false))
    CASE(fmax, extreme(s, true))
    CASE(fneg, unary<u32>(s, [](u32 x) { return x ^ 0x80000000; }))
    FUNCTION(fabs, std::fabs(x))
    FUNCTION(fex2, std::exp2(double(x)))
    FUNCTION(flg2, std::log2(double(x)))
    FUNCTION(frcp, 1.0 / double(x))
    FUNCTION(frsqrt, 1.0 / std::sqrt(double(x)))
    FUNCTION(fsqrt, std::sqrt(double(x)))
    FUNCTION(ftanh, std::tanh(double(x)))
    case op_mixadd:
    case op_mixsub: CASE(mixfma, mixed(s))
    case op_fadd2:
    case op_fsub2:
    case op_fmul2:
      CASE(ffma2, pairs(s))
      BINARY(dadd, double, x + y)
      BINARY(dsub, double, x - y)
      BINARY(dmul, double, x* y)
      BINARY(ddiv, double, x / y)
      CASE(dfma, ternary<double>(s, [](double x, double y, double z) { return std::fma(x, y, z); }))
    case op_hadd:
    case op_hsub:
    case op_hmul:
    case op_hfma:
    case op_hneg:
    case op_habs:
    case op_hmin: CASE(hmax, sixteen_bits(s))
  }
  return false;
}

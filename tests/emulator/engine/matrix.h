// Matrix products: mma.sync, and wgmma, which happens some time after it is issued.
//
// Products of elements are exact. Their sum with the accumulator is taken in float64 and rounded to float32 once for
// each instruction; or, if the launch asks for it, as has been measured on tensor cores (Fasi et al. 2021).
#pragma once

#include "asynchronous.h"

// Products and addend are aligned to the largest exponent, cut to 26 bits, added, and the sum is cut to float32.
inline float truncating_sum(const float* a, const float* b, int k, int b_stride, float c) {
  double terms[17];
  int exponent = std::numeric_limits<int>::min();
  bool finite = std::isfinite(c);
  for (int i = 0; i < k; i++) terms[i] = double(a[i]) * double(b[i * b_stride]);
  terms[k] = c;
  for (int i = 0; i <= k; i++) {
    finite &= std::isfinite(terms[i]);
    if (terms[i] == 0) continue;
    int e;
    std::frexp(terms[i], &e);
    exponent = std::max(exponent, e);
  }
  double sum = 0;
  if (!finite) {
    for (int i = 0; i <= k; i++) sum += terms[i];
    return float(sum);
  }
  if (exponent == std::numeric_limits<int>::min()) return 0.0f + c;
  double unit = std::ldexp(1.0, exponent - 26);
  for (int i = 0; i <= k; i++) sum += std::trunc(terms[i] / unit);
  sum *= unit;
  float f = float(sum);
  return std::fabs(double(f)) > std::fabs(sum) ? std::nextafterf(f, 0.0f) : f;
}

// c (16 × n) += a (16 × k) · b (k × n), all row by row.
inline void Machine::multiply(float* c, const float* a, const float* b, int n, int k, int format) {
  if (launch.truncating) {
    int step = (format == TF32 ? 4 : 8) * (launch.hopper ? 2 : 1);  // Ampere takes fewer terms at once
    for (int row = 0; row < 16; row++)
      for (int column = 0; column < n; column++)
        for (int from = 0; from < k; from += step)
          c[row * n + column] = truncating_sum(a + row * k + from, b + from * n + column, std::min(step, k - from), n,
                                               c[row * n + column]);
    return;
  }
  typedef float Floats __attribute__((vector_size(32)));
  typedef double Doubles __attribute__((vector_size(64)));
  for (int row = 0; row < 16; row++) {
    for (int column = 0; column < n; column += 8) {
      Floats eight;
      memcpy(&eight, c + row * n + column, sizeof eight);
      Doubles sum = __builtin_convertvector(eight, Doubles);
      for (int i = 0; i < k; i++) {
        memcpy(&eight, b + i * n + column, sizeof eight);
        sum += double(a[row * k + i]) * __builtin_convertvector(eight, Doubles);
      }
      eight = __builtin_convertvector(sum, Floats);
      memcpy(c + row * n + column, &eight, sizeof eight);
    }
  }
}

// An element of a register: the whole of it for TF32, whose low 13 bits tensor cores pass over, or a half.
inline float element(u32 word, int format, int half) {
  if (format == TF32) return float_of(word & ~0x1fffu);
  return float_of_16(u16(word >> (16 * half)), format == BFLOAT);
}

// The left operand of m16n8k16, and of m16n8k8 in TF32, from its fragments: registers go down 8 rows, then along k.
inline void Machine::load_a(Warp& warp, const i32* units, int format, float* a, int k) {
  const int per_word = format == TF32 ? 1 : 2, words = k / (4 * per_word) * 2;
  for (int i = 0; i < words; i++) {
    const u32* fragment = warp.unit<u32>(units[i]);
    for (int lane = 0; lane < 32; lane++) {
      int row = lane / 4 + 8 * (i % 2), column = per_word * (lane % 4 + 4 * (i / 2));
      for (int half = 0; half < per_word; half++) a[row * k + column + half] = element(fragment[lane], format, half);
    }
  }
}

// Where register i of a lane lies in an accumulator of 16 × n.
inline int accumulator_at(int i, int lane, int n) {
  return (lane / 4 + 8 * (i % 4 / 2)) * n + i / 4 * 8 + 2 * (lane % 4) + i % 2;
}

inline void Machine::mma(const Step& s) {
  aligned(s, "mma.sync");
  const int format = s.inst.mode, k = s.inst.extra, per_word = format == TF32 ? 1 : 2;
  const int b_words = k / (4 * per_word), a_words = 2 * b_words;
  float a[16 * 16], b[16 * 8], c[16 * 8];
  load_a(s.warp, s.operands + s.inst.results, format, a, k);
  for (int i = 0; i < b_words; i++) {
    const u32* fragment = s.source<u32>(a_words + i);
    for (int lane = 0; lane < 32; lane++)
      for (int half = 0; half < per_word; half++)
        b[(per_word * (lane % 4 + 4 * i) + half) * 8 + lane / 4] = element(fragment[lane], format, half);
  }
  for (int i = 0; i < 4; i++)
    for (int lane = 0; lane < 32; lane++) c[accumulator_at(i, lane, 8)] = s.source<float>(a_words + b_words + i)[lane];
  multiply(c, a, b, 8, k, format);
  for (int i = 0; i < 4; i++)
    for (int lane = 0; lane < 32; lane++) s.result<float>(i)[lane] = c[accumulator_at(i, lane, 8)];
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

// A wgmma's shape and operands: results are the accumulators, sources A (registers or a descriptor), B, and a predicate
// that says whether the accumulators count.
struct WarpgroupProduct {
  explicit WarpgroupProduct(const Inst& inst)
      : format(inst.mode & 3),
        a_in_registers(inst.mode & 4),
        a_transposed(inst.mode & 8),
        b_transposed(inst.mode & 16),
        n(inst.extra),
        k(format == TF32 ? 8 : 16),
        a_sources(a_in_registers ? 4 : 1) {}
  int format;
  bool a_in_registers, a_transposed, b_transposed;
  int n, k, a_sources;
};

// The address of 16 bytes of an operand in shared memory, as its descriptor lays it out. Along k: row `outer` and chunk
// `inner` of that row. Transposed: chunk `outer` of a row along m or n, and row `inner` along k.
inline u32 described_address(u64 descriptor, u32 outer, u32 inner, bool transposed) {
  auto field = [&](int bit) { return u32(descriptor >> bit & 0x3fff) << 4; };
  const u32 start = field(0), leading = field(16), stride = field(32);
  const u32 kind = descriptor >> 62 ? 4 - u32(descriptor >> 62) : 0;  // of swizzled(): 1 there is 128 bytes here
  const u32 width = kind ? 16u << kind : 16;
  u32 offset;
  if (!transposed) {
    offset = outer % 8 * width + outer / 8 * stride + inner * (kind ? 16 : leading);
  } else if (kind) {
    u32 chunks = width / 16;
    offset = outer % chunks * 16 + outer / chunks * leading + inner % 8 * width + inner / 8 * stride;
  } else {
    offset = outer * stride + inner % 8 * 16 + inner / 8 * leading;
  }
  return swizzled(start + offset, kind);
}

// Calls f(whether it is of B, outer, inner, address) for every 16 bytes that this warp's quarter of the product reads.
template <class F>
inline void Machine::product_chunks(const Warp& warp, const Product& product, F f) {
  const WarpgroupProduct shape(*product.inst);
  const u32 quarter = u32(warp.id % 4), k = u32(shape.k), n = u32(shape.n);
  auto rows = [&](bool of_b, u64 descriptor, u32 count, u32 first) {
    for (u32 row = 0; row < count; row++)
      for (u32 chunk = 0; chunk < 2; chunk++)
        f(of_b, row, chunk, described_address(descriptor, first + row, chunk, false));
  };
  auto columns = [&](bool of_b, u64 descriptor, u32 count, u32 first) {
    for (u32 chunk = 0; chunk < count; chunk++)
      for (u32 row = 0; row < k; row++) f(of_b, chunk, row, described_address(descriptor, first + chunk, row, true));
  };
  if (!shape.a_in_registers) {
    if (shape.a_transposed)
      columns(false, product.a, 2, 2 * quarter);
    else
      rows(false, product.a, 16, 16 * quarter);
  }
  if (shape.b_transposed)
    columns(true, product.b, n / 8, 0);
  else
    rows(true, product.b, n, 0);
}

inline void Machine::issue_product(const Step& s) {
  aligned(s, "wgmma");
  Warp& warp = s.warp;
  const WarpgroupProduct shape(s.inst);
  Product product{&s.inst, 0, 0, s.inst.immediate2 == 1, warp.products_committed + 1};
  if (!shape.a_in_registers) product.a = s.source<u64>(0)[0];
  product.b = s.source<u64>(shape.a_sources)[0];
  if (!s.inst.immediate2) {  // a predicate decides
    u32 predicate = *s.source<u32>(shape.a_sources + 1);
    product.accumulate = predicate & 1;
    if (predicate != 0 && predicate != ~0u) find("FAULT", "scale-d differs between lanes" + where(warp));
  }
  for (int i = 0; i < s.inst.results; i++) {
    RegisterState& state = warp.registers[s.operands[i]];
    if (product.accumulate && state.written != ~0u)
      find("UNINIT_REG", "accumulator read before it is written" + where(warp));
    if (state.written_at > warp.wgmma_fence)
      find("RACE", "accumulator written at an earlier instruction, with no wgmma.fence between" + where(warp));
    if (state.in_flight && state.operand_of > warp.products_done)
      find("RACE", "accumulator is still being read as A" + where(warp));
    if (!state.in_flight) state.operand_of = 0;
    state.written = ~0u;
    state.in_flight = true;
    state.result_of = product.group;
  }
  for (int i = 0; shape.a_in_registers && i < shape.a_sources; i++) {
    RegisterState& state = warp.registers[s.operands[s.inst.results + i]];
    if (state.written_at > warp.wgmma_fence)
      find("RACE", "A register written with no wgmma.fence between" + where(warp));
    if (state.in_flight && state.result_of > warp.products_done)
      find("RACE", "A register is an accumulator in flight" + where(warp));
    if (!state.in_flight) state.result_of = 0;
    state.in_flight = true;
    state.operand_of = product.group;
  }
  product_chunks(warp, product, [&](bool, u32, u32, u32 address) {
    if (launch.count) counters().bytes += 16;
    read_shared(warp, address, 16, WGMMA + warp.id, u32(product.group), true);
  });
  if (launch.mode == EARLIEST)
    compute(warp, product);
  else
    warp.products.push_back(product);
}

inline void Machine::compute(Warp& warp, const Product& product) {
  const Inst& inst = *product.inst;
  const WarpgroupProduct shape(inst);
  const int n = shape.n, k = shape.k, per_chunk = shape.format == TF32 ? 4 : 8;
  const i32* accumulators = launch.operands + inst.first_operand;
  std::vector<float> a(16 * k), b(k * n), c(16 * n);
  if (shape.a_in_registers) load_a(warp, accumulators + inst.results, shape.format, a.data(), k);
  product_chunks(warp, product, [&](bool of_b, u32 outer, u32 inner, u32 address) {
    if (address < base || address - base + 16 > size) return;
    const bool transposed = of_b ? shape.b_transposed : shape.a_transposed;
    for (int i = 0; i < per_chunk; i++) {
      u32 word = 0;
      memcpy(&word, at(address) + i * (16 / per_chunk), 16 / per_chunk);
      float value = element(word, shape.format, 0);
      int along_k = transposed ? int(inner) : int(inner) * per_chunk + i;
      int across = transposed ? int(outer) * 8 + i : int(outer);
      (of_b ? b[along_k * n + across] : a[across * k + along_k]) = value;
    }
  });
  for (int i = 0; product.accumulate && i < inst.results; i++)
    for (int lane = 0; lane < 32; lane++) c[accumulator_at(i, lane, n)] = warp.unit<float>(accumulators[i])[lane];
  multiply(c.data(), a.data(), b.data(), n, k, shape.format);
  for (int i = 0; i < inst.results; i++)
    for (int lane = 0; lane < 32; lane++) warp.unit<float>(accumulators[i])[lane] = c[accumulator_at(i, lane, n)];
}

inline void Machine::finish_products(Warp& warp, i32 group) {
  group = std::max(group, warp.products_done);
  size_t due = 0;
  while (due < warp.products.size() && warp.products[due].group <= group) compute(warp, warp.products[due++]);
  warp.products.erase(warp.products.begin(), warp.products.begin() + i64(due));
  warp.products_done = group;
  warp.knowledge.happened[WGMMA + warp.id] = u32(group);
}

inline bool Machine::matrix(const Step& s) {
  Warp& warp = s.warp;
  switch (s.inst.op) {
    CASE(mma, mma(s))
    CASE(wgmma, issue_product(s))
    case op_wg_fence:
      aligned(s, "wgmma.fence");
      warp.wgmma_fence = warp.steps;
      return true;
    case op_wg_commit:
      aligned(s, "wgmma.commit_group");
      warp.products_committed++;
      return true;
    case op_wg_wait:
      aligned(s, "wgmma.wait_group");
      finish_products(warp, warp.products_committed - i32(s.inst.immediate));
      return true;
  }
  return false;
}

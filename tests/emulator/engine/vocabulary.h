// What the engine and Python tell each other: the operations by name, and the structures of a launch.
#pragma once

#include <cstdint>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

#define WIDTHS(X, name) X(name##16) X(name##32) X(name##64)
#define TYPES(X, name) X(name##_u16) X(name##_s16) X(name##_u32) X(name##_s32) X(name##_u64) X(name##_s64)
#define HALF_TYPES(X, name) X(name##_u16) X(name##_s16) X(name##_u32) X(name##_s32)

// clang-format off
#define OPERATIONS(X)                                                                                          \
  X(nop) X(exit) X(bra) X(trap)                                                                                \
  WIDTHS(X, mov) X(movp)                                                                                       \
  X(pack2x16) X(unpack2x16) X(pack2x32) X(unpack2x32) X(pack4x16) X(unpack4x16) X(pack4x8) X(unpack4x8)         \
  WIDTHS(X, add) WIDTHS(X, sub) X(add16x2) WIDTHS(X, mullo) TYPES(X, mulhi) HALF_TYPES(X, mulwide)              \
  WIDTHS(X, madlo) HALF_TYPES(X, madwide)                                                                      \
  WIDTHS(X, and) X(andp) WIDTHS(X, or) X(orp) WIDTHS(X, xor) X(xorp) WIDTHS(X, not) X(notp)                     \
  WIDTHS(X, shl) TYPES(X, shr) TYPES(X, min) TYPES(X, max) WIDTHS(X, neg) WIDTHS(X, abs)                        \
  TYPES(X, div) TYPES(X, rem)                                                                                  \
  X(bfe_u32) X(bfe_s32) X(bfe_u64) X(bfe_s64) X(bfi32) X(prmt) X(lop3) X(popc32) X(clz32) X(brev32)             \
  X(shf_l_wrap) X(shf_r_wrap) WIDTHS(X, selp)                                                                  \
  TYPES(X, setp) X(setp_f16) X(setp_bf16) X(setp_f32) X(setp_f64)                                              \
  X(fadd) X(fsub) X(fmul) X(ffma) X(fmin) X(fmax) X(fneg) X(fabs) X(fdiv)                                      \
  X(fex2) X(flg2) X(frcp) X(frsqrt) X(fsqrt) X(ftanh)                                                          \
  X(mixadd) X(mixsub) X(mixfma) X(fadd2) X(fsub2) X(fmul2) X(ffma2)                                            \
  X(dadd) X(dsub) X(dmul) X(dfma) X(ddiv)                                                                      \
  X(hadd) X(hsub) X(hmul) X(hfma) X(hneg) X(habs) X(hmin) X(hmax)                                              \
  X(cvt) X(cvt_f16x2) X(cvt_bf16x2)                                                                            \
  X(ldparam) X(cvta_param) X(ldg) X(stg) X(lds) X(sts) X(ldmatrix) X(stmatrix) X(mma)                           \
  X(cpasync) X(cpasync_commit) X(cpasync_wait)                                                                 \
  X(bar) X(barwarp) X(shfl) X(vote) X(elect) X(redux) X(activemask)                                            \
  X(mbar_init) X(mbar_inval) X(mbar_arrive) X(mbar_expect) X(mbar_try) X(mbar_test)                             \
  X(tma_load) X(tma_store) X(bulk_commit) X(bulk_wait)                                                         \
  X(wg_fence) X(wg_commit) X(wg_wait) X(wgmma) X(fence_proxy) X(fence) X(grid_wait)
// clang-format on

enum Operation {
#define X(name) op_##name,
  OPERATIONS(X)
#undef X
      operation_count
};

inline const char* const OPERATION_NAMES[] = {
#define X(name) #name,
    OPERATIONS(X)
#undef X
};

// A decoded instruction. Its operands are units of the register file, results first. What `mode`, `extra`, `target` and
// the immediates mean depends on the operation; instructions.py writes them.
struct Inst {
  i32 op, mode, guard, guard_negated, results, sources, first_operand, target, line, extra;
  i64 immediate, immediate2;
};

struct Allocation {  // a tensor of the launch
  u64 start, end;
  u64 constant;  // whether no kernel writes it, as a model's weights
};

struct Special {  // a register that holds what a lane is, such as %tid.x
  i32 unit, which;
};

struct Counters {  // of one instruction
  u64 warps, lanes, wavefronts, ideal, bytes, sectors;
};

enum Mode { EARLIEST, LATEST, RANDOM };

struct Launch {
  const Inst* program;
  const i32* operands;
  const u8* constants;  // the immediates, as units of the register file that are filled before the start
  i64 first_constant, constant_units;
  i64 units, warps, shared_bytes, shared_base;
  const Special* specials;
  i64 special_count;
  const u8* params;
  i64 param_bytes;
  i64 grid[3];
  const Allocation* allocations;
  i64 allocation_count;
  i64 mode, seed, slice, favourite;
  i64 count, truncating, hopper;
  i64 programmatic;  // whether it may start before the kernels before it have ended
  i64 first_block, block_count;
  Counters* counters;
  char* report;
  i64 report_bytes;
  u64 executed;
};

// What the launcher passes in place of a CUtensorMap, in the same 128 bytes.
struct TensorMap {
  u64 magic, base;
  u32 rank, element_bytes, swizzle, unused;
  u64 size[3], stride[3];  // elements; bytes
  u32 box[3], unused2;
};
constexpr u64 TENSOR_MAP_MAGIC = 0x50414d524f534e54ull;

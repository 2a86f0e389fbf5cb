// A block's state: its warps, their registers, and everything that is in flight.
#pragma once

#include <string>
#include <vector>

#include "vocabulary.h"

// The parties of the happens-before order: warps, and what runs beside them. A warp's cp.async copies, its wgmma
// products and its bulk stores are a party each, whose clock is the number of the commit group; so are the loads of
// each mbarrier.
enum Party {
  MAX_WARPS = 16,
  CP_ASYNC = 16,
  WGMMA = 32,
  BULK_STORE = 48,
  READERS = 64,  // the parties below this one read shared memory
  TENSOR_LOAD = 64,
  PARTIES = 96,
};

struct Clocks {
  u32 of[PARTIES] = {};

  u32& operator[](int party) { return of[party]; }
  u32 operator[](int party) const { return of[party]; }
  void join(const Clocks& other) {
    for (int i = 0; i < PARTIES; i++) of[i] = of[i] < other.of[i] ? other.of[i] : of[i];
  }
};

// What a warp, a barrier or an mbarrier knows to have happened: at all, and with a proxy fence since; and whether the
// kernels before this one have ended.
struct Knowledge {
  Clocks happened, fenced;
  bool grids = false;

  void join(const Knowledge& other) {
    happened.join(other.happened);
    fenced.join(other.fenced);
    grids |= other.grids;
  }
};

struct Copy {  // a lane's cp.async
  u32 destination;
  u64 source;
  u32 bytes, available;  // what lies between the two is filled with zeros
  i32 group;
};

struct Product {  // a warp's quarter of a wgmma
  const Inst* inst;
  u64 a, b;  // descriptors
  bool accumulate;
  i32 group;
};

struct TensorCopy {
  TensorMap map;
  i32 coordinate[3];
  u32 shared;
  u32 mbarrier, clock;  // of a load
  i32 group, warp, pc;  // of a store
  bool written;
};

struct MBarrier {
  u32 count, pending;
  i64 bytes;  // that are still to come
  u32 phase;
  Knowledge knowledge;
  int party;
  u32 clock;  // of its last load
  bool live;
};

struct Barrier {
  u32 arrived = 0;  // a bit for each warp
  Knowledge knowledge;
};

struct Path {  // lanes that wait, and where they will meet others
  i32 pc, meeting;
  u32 lanes;
};

// What the checker knows of a unit of the register file.
struct RegisterState {
  u32 written = 0;         // lanes
  bool in_flight = false;  // whether the next two are of interest
  i32 result_of = 0;       // the last wgmma group that writes it
  i32 operand_of = 0;      // the last wgmma group that reads it
  u64 written_at = 0;      // in the warp's steps
};

enum class Waiting { no, barrier, mbarrier };

struct Warp {
  int id;
  u8* file;  // registers in units of 64 bytes: 16 bits of 32 lanes are one unit; of a predicate the first 4 bytes count
  std::vector<RegisterState> registers;

  i32 pc, meeting;
  u32 active, exited;  // lanes
  std::vector<Path> others;
  bool done;
  u64 steps;

  Waiting waiting;
  int barrier;  // that it waits at
  u32 mbarrier, parity;
  i32 gave_up_at;  // the mbarrier.try_wait that has just given up once

  Knowledge knowledge;
  u32 waited;  // lanes that have waited for the kernels before
  std::vector<Copy> copies;
  std::vector<Product> products;
  std::vector<TensorCopy> stores;
  i32 copies_committed, products_committed, stores_committed;  // groups
  i32 copies_done, products_done, stores_done;
  u64 wgmma_fence;  // the step of the last

  template <class T>
  T* unit(i32 number) {
    return reinterpret_cast<T*>(file + u64(number) * 64);
  }
  u32& predicate(i32 number) { return *unit<u32>(number); }
};

struct Finding {
  std::string text;
  u64 count;
};

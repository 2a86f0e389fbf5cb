// One block of a kernel at a time, over real memory, with an adversary for everything that is asynchronous.
#pragma once

#include <map>
#include <random>
#include <string>
#include <vector>

#include "numbers.h"
#include "state.h"

// Calls `f` for each lane of a mask. The first loop is the one that the compiler makes vector instructions of.
template <class F>
inline __attribute__((always_inline)) void for_lanes(u32 mask, F f) {
  if (mask == ~0u) {
    for (int lane = 0; lane < 32; lane++) f(lane);
  } else {
    for (u32 rest = mask; rest; rest &= rest - 1) f(__builtin_ctz(rest));
  }
}

// An instruction that a warp executes with some of its lanes.
struct Step {
  Warp& warp;
  const Inst& inst;
  const i32* operands;
  u32 mask;

  template <class T>
  T* result(int i) const {
    return warp.unit<T>(operands[i]);
  }
  template <class T>
  T* source(int i) const {
    return warp.unit<T>(operands[inst.results + i]);
  }
  // An address in a register of 4 or 8 bytes, with the constant that is added to it.
  u32 shared_address(int i, int lane) const {
    return (inst.target == 8 ? u32(source<u64>(i)[lane]) : source<u32>(i)[lane]) + u32(inst.immediate);
  }
  void set_predicate(int i, u32 value) const {
    u32& predicate = warp.predicate(operands[i]);
    predicate = (predicate & ~mask) | (value & mask);
  }
};

class Machine {
 public:
  explicit Machine(const Launch& launch);
  ~Machine();
  void run_block(i64 number);
  void end_grid();
  std::string report() const;
  u64 executed = 0;

 private:
  enum class Progress { going, waits, ended };

  // schedule.h
  void start(Warp& warp, int id);
  std::vector<int> ready_warps();
  int chosen(const std::vector<int>& ready, u64 turn);
  bool land_a_load();
  void disturb(Warp& warp);
  void end_block();
  Progress step(Warp& warp);
  void branch(const Step& s);
  void meet(Warp& warp);
  void check_registers(const Step& s);
  bool execute(const Step& s, Progress& progress);

  // arithmetic.h, conversion.h, memory.h, matrix.h, barriers.h: each executes the operations of its own
  bool arithmetic(const Step& s);
  bool floating(const Step& s);
  bool conversion(const Step& s);
  bool memory(const Step& s);
  bool bulk(const Step& s);
  bool matrix(const Step& s);
  bool lanes(const Step& s);
  bool barriers(const Step& s, Progress& progress);

  // memory.h
  void load_param(const Step& s);
  void global_access(const Step& s, bool store);
  void shared_load(const Step& s);
  void shared_store(const Step& s);
  void matrix_access(const Step& s, bool store);

  // asynchronous.h
  void issue_copies(const Step& s);
  void land(const Copy& copy);
  void land_copies(Warp& warp, i32 group);
  void issue_tensor_copy(const Step& s, int lane, bool store);
  template <class F>
  void tensor_rows(const TensorCopy& copy, F f);
  void land_load(const TensorCopy& load);
  void land_store(TensorCopy& store);
  void land_stores(Warp& warp, i32 group);
  void turn_phase(MBarrier& mbarrier);

  // matrix.h
  void mma(const Step& s);
  void issue_product(const Step& s);
  void compute(Warp& warp, const Product& product);
  void finish_products(Warp& warp, i32 group);
  void load_a(Warp& warp, const i32* units, int format, float* a, int k);
  template <class F>
  void product_chunks(const Warp& warp, const Product& product, F f);
  void multiply(float* c, const float* a, const float* b, int n, int k, int format);

  // barriers.h
  Progress barrier(const Step& s);
  Progress mbarrier(const Step& s);

  // order.h
  void forget_shared();
  bool inside(Warp& warp, u32 address, u32 bytes, int lane);
  bool read_shared(Warp& warp, u32 address, u32 bytes, int party, u32 clock, bool async, int lane = -1);
  bool write_shared(Warp& warp, u32 address, u32 bytes, int party, u32 clock, int lane = -1, const u8* data = nullptr);
  bool global(Warp& warp, u64 address, u64 bytes, bool write, int lane);
  bool early(Warp& warp, u64 address, u64 bytes, bool write, int lane);
  void among_blocks(Warp& warp, i64 tensor, u64 address, u64 bytes, bool write, int lane);

  // findings.h
  void find(const char* kind, int at, const std::string& text);
  void find(const char* kind, const std::string& text) { find(kind, pc, text); }
  void aligned(const Step& s, const char* what);
  std::string where(const Warp& warp, int lane = -1) const;

  // counting.h
  void count_conflicts(u32 mask, const u32* address, u32 bytes);
  void count_sectors(u32 mask, const u64* address, u32 bytes);
  Counters& counters() { return launch.counters[pc]; }

  u8* at(u32 address) { return &shared[address - base]; }
  bool chance(u64 one_in) { return random() % one_in == 0; }

  const Launch& launch;
  const u32 base, size;  // of shared memory
  std::vector<Warp> warps;
  std::vector<u8> shared;
  std::map<u32, MBarrier> mbarriers;
  std::map<int, Barrier> named_barriers;
  std::vector<TensorCopy> loads;  // in flight
  i64 block = 0, block_index[3] = {};
  i32 pc = 0;  // of the instruction that is executed
  std::mt19937_64 random;
  std::map<std::pair<std::string, int>, Finding> findings;

  // By byte of shared memory: whether it was written, by whom last and when, and each reader's last clock.
  std::vector<u8> initialised, writer;
  std::vector<u32> written;
  std::vector<u32> last_read[READERS];
  std::vector<int> readers;
  std::vector<std::vector<u32>> writing_block;  // by tensor and byte: 1 + the block that has written it
  i64 last_tensor = 0;
  bool grids_waited = false;  // whether any lane has waited for the kernels before
};

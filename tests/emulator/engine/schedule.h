// A block from its start to its end: which warp goes on, and when what is in flight lands.
#pragma once

#include "barriers.h"

inline Machine::Machine(const Launch& launch)
    : launch(launch),
      base(u32(launch.shared_base)),
      size(u32(launch.shared_bytes)),
      warps(launch.warps),
      shared(size + 64),
      writing_block(launch.allocation_count) {
  random.seed(u64(launch.seed) * 7919 + 17);
  for (Warp& warp : warps) {
    warp.file = static_cast<u8*>(aligned_alloc(64, u64(launch.units + 1) * 64));
    warp.registers.resize(launch.units);
  }
}

inline Machine::~Machine() {
  for (Warp& warp : warps) free(warp.file);
}

inline void Machine::start(Warp& warp, int id) {
  u8* file = warp.file;
  std::vector<RegisterState> registers = std::move(warp.registers);
  std::fill(registers.begin(), registers.end(), RegisterState{});
  warp = Warp{};
  warp.file = file;
  warp.registers = std::move(registers);
  warp.id = id;
  warp.meeting = warp.gave_up_at = -1;
  warp.active = ~0u;
  warp.steps = 1;
  warp.knowledge.happened[id] = 1;
  memcpy(file + launch.first_constant * 64, launch.constants, launch.constant_units * 64);
  for (i64 i = 0; i < launch.constant_units; i++) warp.registers[launch.first_constant + i].written = ~0u;
  const i64 threads = 32 * launch.warps;
  for (i64 i = 0; i < launch.special_count; i++) {
    const Special& special = launch.specials[i];
    warp.registers[special.unit].written = ~0u;
    for (int lane = 0; lane < 32; lane++) {
      // In the order of instructions.py. Blocks have one dimension, clusters one block.
      const i64 values[] = {id * 32 + lane,
                            0,
                            0,
                            threads,
                            1,
                            1,
                            block_index[0],
                            block_index[1],
                            block_index[2],
                            launch.grid[0],
                            launch.grid[1],
                            launch.grid[2],
                            lane,
                            id,
                            0,
                            0};
      warp.unit<u32>(special.unit)[lane] = u32(values[special.which]);
    }
  }
}

inline std::vector<int> Machine::ready_warps() {
  std::vector<int> ready;
  for (Warp& warp : warps) {
    if (warp.done || warp.waiting == Waiting::barrier) continue;
    if (warp.waiting == Waiting::mbarrier) {
      if ((mbarriers[warp.mbarrier].phase & 1) == warp.parity) continue;
      warp.waiting = Waiting::no;
    }
    ready.push_back(warp.id);
  }
  return ready;
}

// The warp that goes on. A favourite goes whenever it can; one that is put off (negative) when no other can.
inline int Machine::chosen(const std::vector<int>& ready, u64 turn) {
  if (launch.seed) return ready[random() % ready.size()];
  if (!launch.favourite) return ready[turn % ready.size()];
  const int preferred = int(std::abs(launch.favourite)) - 1;
  for (int id : ready)
    if ((id == preferred) == (launch.favourite > 0)) return id;
  return ready[0];
}

inline bool Machine::land_a_load() {
  if (loads.empty()) return false;
  i64 i = launch.seed ? i64(random() % loads.size()) : 0;
  land_load(loads[i]);
  loads.erase(loads.begin() + i);
  return true;
}

// Something in flight lands.
inline void Machine::disturb(Warp& warp) {
  if (!warp.copies.empty() && chance(2)) {
    i64 i = i64(random() % warp.copies.size());
    land(warp.copies[i]);
    warp.copies.erase(warp.copies.begin() + i);
  }
  if (!warp.products.empty() && chance(3)) {  // these keep their order
    compute(warp, warp.products[0]);
    warp.products.erase(warp.products.begin());
  }
  if (!warp.stores.empty() && chance(3)) land_store(warp.stores[random() % warp.stores.size()]);
  if (chance(3)) land_a_load();
}

inline void Machine::run_block(i64 number) {
  constexpr u64 FOR_EVER = 4'000'000'000;
  block = number;
  block_index[0] = number % launch.grid[0];
  block_index[1] = number / launch.grid[0] % launch.grid[1];
  block_index[2] = number / launch.grid[0] / launch.grid[1];
  std::fill(shared.begin(), shared.end(), 0xcd);
  mbarriers.clear();
  named_barriers.clear();
  loads.clear();
  forget_shared();
  for (size_t i = 0; i < warps.size(); i++) start(warps[i], int(i));

  u64 turn = 0, steps = 0;
  auto running = [](const Warp& warp) { return !warp.done; };
  while (std::any_of(warps.begin(), warps.end(), running)) {
    std::vector<int> ready = ready_warps();
    if (ready.empty()) {
      if (land_a_load()) continue;
      std::string text = "deadlock:";
      for (const Warp& warp : warps) {
        if (warp.done) continue;
        pc = warp.pc;
        text += " warp " + std::to_string(warp.id) + (warp.waiting == Waiting::barrier ? " after" : " in") + " line " +
                std::to_string(launch.program[warp.waiting == Waiting::barrier ? warp.pc - 1 : warp.pc].line) + ";";
      }
      find("FAULT", text);
      return;
    }
    // Without a seed the warps take turns, each until it waits; with one, a few instructions of any warp at a time. With
    // a favourite each instruction may make another ready that goes before.
    Warp& warp = warps[chosen(ready, turn++)];
    i64 slice = launch.seed        ? 1 + i64(random() % u64(launch.slice))
                : launch.favourite ? 1
                                   : std::numeric_limits<i64>::max();
    for (i64 i = 0; i < slice; i++) {
      steps++;
      Progress progress = step(warp);
      if (launch.mode == RANDOM && chance(16)) disturb(warp);
      if (progress != Progress::going || steps > FOR_EVER) break;
    }
    if (steps > FOR_EVER) return find("FAULT", "runs for ever" + where(warp));
  }
  executed += steps;
  end_block();
}

inline void Machine::end_block() {
  for (Warp& warp : warps) {
    if (warp.stores_done < warp.stores_committed || !warp.stores.empty())
      find("FAULT", warp.stores.empty() ? 0 : warp.stores[0].pc,
           "the block ends while a bulk store may still be reading its shared memory" + where(warp));
    for (TensorCopy& store : warp.stores) land_store(store);
    if (!warp.copies.empty()) pc = 0, find("NOTE", "the block ends with cp.async in flight" + where(warp));
    if (!warp.products.empty())
      find("FAULT", int(warp.products[0].inst - launch.program), "the block ends with wgmma in flight" + where(warp));
  }
  if (!loads.empty()) find("FAULT", loads[0].pc, "the block ends with a tensor load in flight");
}

// A kernel that waits for those before it, and ends, ends after them all. Of one that does not wait, a later kernel's own
// wait tells nothing about those before.
inline void Machine::end_grid() {
  if (launch.programmatic && !grids_waited)
    find("FAULT", 0, "launched programmatically, and never waits for the kernels before it (griddepcontrol.wait)");
}

// ---- one instruction ------------------------------------------------------------------------------------------------

inline Machine::Progress Machine::step(Warp& warp) {
  pc = warp.pc;
  const Inst& inst = launch.program[pc];
  u32 mask = warp.active;
  warp.steps++;
  if (inst.guard >= 0) {
    if ((warp.registers[inst.guard].written & mask) != mask)
      find("UNINIT_REG", "guard predicate read before it is written" + where(warp));
    mask &= inst.guard_negated ? ~warp.predicate(inst.guard) : warp.predicate(inst.guard);
  }
  const Step s{warp, inst, launch.operands + inst.first_operand, mask};
  if (launch.count) {
    counters().warps++;
    counters().lanes += __builtin_popcount(mask);
  }
  if (inst.op == op_bra) {
    branch(s);
    return Progress::going;
  }
  warp.pc++;
  Progress progress = Progress::going;
  if (inst.op == op_exit) {
    warp.exited |= mask;
    warp.active &= ~mask;
  } else if (mask) {
    check_registers(s);
    if (!execute(s, progress)) find("FAULT", std::string("not implemented: ") + OPERATION_NAMES[inst.op]);
    // A warp at an mbarrier tries again; one at a barrier goes on after it.
    if (progress == Progress::waits && warp.waiting == Waiting::mbarrier) warp.pc = pc;
  }
  if (progress == Progress::going) meet(warp);
  return warp.done ? Progress::ended : progress;
}

inline void Machine::branch(const Step& s) {
  Warp& warp = s.warp;
  if (s.mask == 0) {
    warp.pc++;
  } else {
    if (u32 rest = warp.active & ~s.mask) {
      i32 meeting = i32(s.inst.immediate);  // of the branch's two ways, or -1
      if (meeting >= 0) warp.others.push_back({meeting, warp.meeting, warp.active});
      if (meeting >= 0) warp.meeting = meeting;
      warp.others.push_back({warp.pc + 1, warp.meeting, rest});
    }
    warp.active = s.mask;
    warp.pc = s.inst.target;
  }
  meet(warp);
}

// Where lanes reach the place at which they meet others, those go on; then all together.
inline void Machine::meet(Warp& warp) {
  while (!warp.others.empty() && (warp.pc == warp.meeting || warp.active == 0)) {
    Path path = warp.others.back();
    warp.others.pop_back();
    warp.pc = path.pc;
    warp.meeting = path.meeting;
    warp.active = path.lanes & ~warp.exited;
  }
  if (warp.active == 0) warp.done = true;
}

inline void Machine::check_registers(const Step& s) {
  Warp& warp = s.warp;
  const bool product = s.inst.op == op_wgmma;  // which looks after its own registers
  for (int i = 0; i < s.inst.sources; i++) {
    const RegisterState& state = warp.registers[s.operands[s.inst.results + i]];
    if ((state.written & s.mask) != s.mask)
      find("UNINIT_REG", "operand " + std::to_string(i) + " read before it is written" + where(warp));
    if (state.in_flight && !product && state.result_of > warp.products_done)
      find("RACE", "reads an accumulator that wgmma group " + std::to_string(state.result_of) +
                       " may not have written yet" + where(warp));
  }
  if (product) return;
  for (int i = 0; i < s.inst.results; i++) {
    RegisterState& state = warp.registers[s.operands[i]];
    state.written |= s.mask;
    state.written_at = warp.steps;
    if (!state.in_flight) continue;
    if (state.result_of > warp.products_done)
      find("RACE",
           "writes an accumulator of wgmma group " + std::to_string(state.result_of) + " in flight" + where(warp));
    else if (state.operand_of > warp.products_done)
      find("RACE", "overwrites a register that wgmma group " + std::to_string(state.operand_of) +
                       " may still be reading" + where(warp));
    else
      state.in_flight = false;
  }
}

inline bool Machine::execute(const Step& s, Progress& progress) {
  switch (s.inst.op) {
    case op_nop:
      CASE(fence, ) CASE(trap, find("FAULT", "trap" + where(s.warp)))
  }
  return arithmetic(s) || floating(s) || memory(s) || matrix(s) || bulk(s) || barriers(s, progress) || conversion(s) ||
         lanes(s);
}

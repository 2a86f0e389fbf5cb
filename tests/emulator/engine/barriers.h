// What warps and lanes tell each other: barriers, mbarriers, fences, shuffles, votes.
#pragma once

#include "matrix.h"

inline Machine::Progress Machine::barrier(const Step& s) {
  aligned(s, "bar.sync");
  Warp& warp = s.warp;
  const int number = int(s.inst.immediate);
  const int wanted = s.inst.immediate2 ? int(s.inst.immediate2) / 32 : int(warps.size());
  const bool only_arrives = s.inst.mode & 1;
  Barrier& barrier = named_barriers[number];
  if (!barrier.arrived) barrier.knowledge = {};
  warp.knowledge.grids |= warp.waited != 0;
  barrier.knowledge.join(warp.knowledge);
  barrier.arrived |= 1u << warp.id;
  if (__builtin_popcount(barrier.arrived) < wanted) {
    if (only_arrives) return Progress::going;
    warp.waiting = Waiting::barrier;
    warp.barrier = number;
    return Progress::waits;
  }
  for (Warp& other : warps) {
    if (!(barrier.arrived >> other.id & 1)) continue;
    bool waits = other.waiting == Waiting::barrier && other.barrier == number;
    if (waits || (other.id == warp.id && !only_arrives)) other.knowledge.join(barrier.knowledge);
    if (waits) other.waiting = Waiting::no;
    other.knowledge.happened[other.id]++;
  }
  barrier.arrived = 0;
  return Progress::going;
}

inline Machine::Progress Machine::mbarrier(const Step& s) {
  Warp& warp = s.warp;
  const int lane = __builtin_ctz(s.mask);
  const u32 address = s.shared_address(0, lane);
  auto fault = [&](const std::string& text) { find("FAULT", text + where(warp)); };
  auto own_clock = [&]() -> u32& { return warp.knowledge.happened[warp.id]; };
  if (address % 8) fault("misaligned mbarrier");
  if (s.inst.op == op_mbar_init) {
    write_shared(warp, address, 8, warp.id, own_clock());
    MBarrier& mbarrier = mbarriers[address];
    if (mbarrier.live) fault("mbarrier.init of a live mbarrier");
    // One party for an address, whose clock goes on: what its loads once wrote is not forgotten.
    int party = mbarrier.party ? mbarrier.party : TENSOR_LOAD + int(mbarriers.size()) - 1;
    if (party >= PARTIES) fault("more mbarriers than the emulator has room for");
    u32 clock = mbarrier.clock;
    mbarrier = {};
    mbarrier.count = mbarrier.pending = s.source<u32>(1)[lane];
    mbarrier.party = std::min(party, PARTIES - 1);
    mbarrier.clock = clock;
    mbarrier.live = true;
    return Progress::going;
  }
  auto found = mbarriers.find(address);
  if (found == mbarriers.end() || !found->second.live) {
    fault("mbarrier at " + hex(address) + " is not initialised");
    if (s.inst.results) s.set_predicate(0, ~0u);  // so that nothing waits for it
    return Progress::going;
  }
  MBarrier& mbarrier = found->second;
  if (s.inst.op == op_mbar_inval) {
    write_shared(warp, address, 8, warp.id, own_clock());
    if (mbarrier.bytes) fault("mbarrier.inval with bytes outstanding");
    mbarrier.live = false;
    return Progress::going;
  }
  read_shared(warp, address, 8, warp.id, own_clock(), false);
  if (s.inst.op == op_mbar_arrive || s.inst.op == op_mbar_expect) {
    for_lanes(s.mask, [&](int each) {
      if (s.inst.mode & 1) mbarrier.bytes += s.source<u32>(1)[each];  // expect_tx
      if (s.inst.op == op_mbar_expect) return;
      if (mbarrier.pending == 0) return fault("too many arrivals");
      mbarrier.pending--;
    });
    if (s.inst.op == op_mbar_arrive) {
      mbarrier.knowledge.join(warp.knowledge);
      mbarrier.knowledge.grids |= (warp.waited & s.mask) != 0;
      own_clock()++;
    }
    turn_phase(mbarrier);
    return Progress::going;
  }
  const u32 parity = s.source<u32>(1)[lane] & 1;
  if ((mbarrier.phase & 1) != parity) {  // that phase is complete
    warp.knowledge.join(mbarrier.knowledge);
    warp.gave_up_at = -1;
    s.set_predicate(0, ~0u);
    return Progress::going;
  }
  // A try_wait may give up after a while: an adversary has each do so once.
  bool gives_up = s.inst.op == op_mbar_test || (launch.mode != EARLIEST && warp.gave_up_at != pc);
  if (gives_up) {
    warp.gave_up_at = pc;
    s.set_predicate(0, 0);
    return Progress::going;
  }
  warp.waiting = Waiting::mbarrier;
  warp.mbarrier = address;
  warp.parity = parity;
  if (launch.count) {  // it is executed again when the phase is complete
    counters().warps--;
    counters().lanes -= __builtin_popcount(s.mask);
  }
  return Progress::waits;
}

inline bool Machine::barriers(const Step& s, Progress& progress) {
  Knowledge& known = s.warp.knowledge;
  switch (s.inst.op) {
    CASE(bar, progress = barrier(s))
    case op_mbar_init:
    case op_mbar_inval:
    case op_mbar_arrive:
    case op_mbar_expect:
    case op_mbar_try: CASE(mbar_test, progress = mbarrier(s))
    case op_fence_proxy:
      known.fenced = known.happened;
      known.happened[s.warp.id]++;  // what is written later is not fenced
      return true;
      CASE(barwarp, known.grids |= s.warp.waited != 0)
    case op_grid_wait:
      s.warp.waited |= s.mask;
      grids_waited = true;
      return true;
  }
  return false;
}

// ---- lanes of a warp ------------------------------------------------------------------------------------------------

inline u32 reduced(u32 x, u32 y, int how) {
  switch (how) {
    case 0: return x + y;
    case 1: return std::min(x, y);
    case 2: return std::max(x, y);
    case 3: return u32(std::min(i32(x), i32(y)));
    case 4: return u32(std::max(i32(x), i32(y)));
    case 5: return x & y;
    case 6: return x | y;
    default: return x ^ y;
  }
}

inline bool Machine::lanes(const Step& s) {
  const u32 mask = s.mask;
  auto give_all = [&](u32 value) { for_lanes(mask, [&](int lane) { s.result<u32>(0)[lane] = value; }); };
  switch (s.inst.op) {
    case op_shfl: {
      enum { BUTTERFLY, INDEX, UP };
      const u32 *value = s.source<u32>(0), *by = s.source<u32>(1), *clamp = s.source<u32>(2),
                *members = s.source<u32>(3);
      u32 result[32], valid = 0;
      for_lanes(mask, [&](int lane) {
        int b = by[lane] & 31, c = clamp[lane] & 31, segment = clamp[lane] >> 8 & 31;
        int last = (lane & segment) | (c & ~segment), first = lane & segment;
        int from = s.inst.mode == BUTTERFLY ? lane ^ b
                   : s.inst.mode == INDEX   ? first | (b & ~segment)
                   : s.inst.mode == UP      ? lane - b
                                            : lane + b;
        bool ok = s.inst.mode == UP ? from >= last : from <= last;
        if (!ok) from = lane;
        if (members[lane] & ~mask & ~s.warp.exited)
          find("FAULT", "shfl.sync waits for lanes that are elsewhere" + where(s.warp, lane));
        if (!(mask >> from & 1)) find("UNINIT_REG", "shfl.sync reads an inactive lane" + where(s.warp, lane));
        result[lane] = value[from];
        valid |= u32(ok) << lane;
      });
      for_lanes(mask, [&](int lane) { s.result<u32>(0)[lane] = result[lane]; });
      if (s.inst.results > 1) s.set_predicate(1, valid);
      return true;
    }
    case op_vote: {
      enum { ALL, ANY, UNIFORM, BALLOT };
      u32 votes = (s.inst.extra ? ~*s.source<u32>(0) : *s.source<u32>(0)) & mask;
      bool all = votes == mask, none = votes == 0;
      if (s.inst.mode == BALLOT) return give_all(votes), true;
      bool holds = s.inst.mode == ALL ? all : s.inst.mode == ANY ? !none : all || none;
      s.set_predicate(0, holds ? ~0u : 0);
      return true;
    }
    case op_elect: {
      int leader = __builtin_ctz(mask);
      give_all(u32(leader));
      s.set_predicate(1, 1u << leader);
      return true;
    }
      CASE(activemask, give_all(mask))
    case op_redux: {
      const u32* value = s.source<u32>(0);
      int first = __builtin_ctz(mask);
      u32 result = value[first];
      for_lanes(mask & (mask - 1), [&](int lane) { result = reduced(result, value[lane], s.inst.mode); });
      give_all(result);
      return true;
    }
  }
  return false;
}

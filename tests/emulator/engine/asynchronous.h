// Copies that happen some time after they are issued: cp.async, and those of the tensor copy engine.
//
// The checker takes note of a copy when it is issued, and the bytes move when the adversary has them move.
#pragma once

#include "memory.h"

inline void Machine::issue_copies(const Step& s) {
  Warp& warp = s.warp;
  const u32 bytes = u32(s.inst.immediate);
  const i32 group = warp.copies_committed + 1;
  const u32 to_offset = u32(s.inst.immediate2);
  const i64 from_offset = i64(i32(s.inst.immediate2 >> 32));
  u32 destinations[32], reading = 0;
  u64 sources[32];
  for_lanes(s.mask, [&](int lane) {
    Copy copy{};
    copy.destination = destinations[lane] =
        (s.inst.target == 8 ? u32(s.source<u64>(0)[lane]) : s.source<u32>(0)[lane]) + to_offset;
    copy.source = sources[lane] = s.source<u64>(1)[lane] + u64(from_offset);
    copy.bytes = bytes;
    copy.available = s.inst.sources > 2 ? std::min(bytes, s.source<u32>(2)[lane]) : bytes;
    copy.group = group;
    if (copy.destination % bytes)
      find("FAULT", "misaligned cp.async destination " + hex(copy.destination) + where(warp, lane));
    if (copy.available && copy.source % bytes)
      find("FAULT", "misaligned cp.async source ..." + hex(copy.source & 0xff) + where(warp, lane));
    if (copy.available && !global(warp, copy.source, copy.available, false, lane)) copy.available = 0;
    if (copy.available) reading |= 1u << lane;
    if (!write_shared(warp, copy.destination, bytes, CP_ASYNC + warp.id, u32(group), lane)) return;
    if (launch.mode == EARLIEST)
      land(copy);
    else
      warp.copies.push_back(copy);
  });
  if (!launch.count) return;
  u64 counted = counters().bytes;
  count_conflicts(s.mask, destinations, bytes);
  counters().bytes = counted;  // bytes are those of global memory
  if (reading) count_sectors(reading, sources, bytes);
}

inline void Machine::land(const Copy& copy) {
  memcpy(at(copy.destination), reinterpret_cast<const void*>(copy.source), copy.available);
  memset(at(copy.destination) + copy.available, 0, copy.bytes - copy.available);
}

// All copies up to a commit group land, and the warp knows of it.
inline void Machine::land_copies(Warp& warp, i32 group) {
  group = std::max(group, warp.copies_done);
  auto landed = std::remove_if(warp.copies.begin(), warp.copies.end(), [&](const Copy& copy) {
    if (copy.group <= group) land(copy);
    return copy.group <= group;
  });
  warp.copies.erase(landed, warp.copies.end());
  warp.copies_done = group;
  warp.knowledge.happened[CP_ASYNC + warp.id] = u32(group);
}

// ---- tensor copies --------------------------------------------------------------------------------------------------

// 16-byte chunks of a row of 32, 64 or 128 bytes change places by bits 7 and up of their address. `kind`: 1 for 32
// bytes, 2 for 64, 3 for 128.
inline u32 swizzled(u32 address, u32 kind) {
  const u32 masks[] = {0, 0x10, 0x30, 0x70};
  return address ^ (address >> 3 & masks[kind]);
}

// Calls f(shared address, global address, first byte, end) for every 16 bytes of a box; outside the tensor the last two
// leave nothing between them.
template <class F>
inline void Machine::tensor_rows(const TensorCopy& copy, F f) {
  const TensorMap& map = copy.map;
  const i64 element = map.element_bytes;
  u32 linear = copy.shared;
  for (u32 z = 0; z < (map.rank > 2 ? map.box[2] : 1); z++) {
    for (u32 y = 0; y < (map.rank > 1 ? map.box[1] : 1); y++) {
      const i64 index[] = {0, map.rank > 1 ? copy.coordinate[1] + i64(y) : 0,
                           map.rank > 2 ? copy.coordinate[2] + i64(z) : 0};
      bool held = true;
      u64 row = map.base;
      for (u32 d = 1; d < map.rank; d++) {
        held &= index[d] >= 0 && index[d] < i64(map.size[d]);
        row += u64(index[d]) * map.stride[d];
      }
      for (u32 x = 0; x < map.box[0] * map.element_bytes; x += 16, linear += 16) {
        i64 column = copy.coordinate[0] + x / element;
        i64 first = std::max<i64>(0, -column) * element;
        i64 end = std::min<i64>(16, (i64(map.size[0]) - column) * element);
        if (!held || end < first) first = end = 0;
        f(swizzled(linear, map.swizzle), row + u64(column * element), u32(first), u32(end));
      }
    }
  }
}

inline void Machine::issue_tensor_copy(const Step& s, int lane, bool store) {
  Warp& warp = s.warp;
  TensorCopy copy{};
  u64 descriptor = s.source<u64>(1)[lane];
  u64 params = reinterpret_cast<u64>(launch.params);
  auto fault = [&](const std::string& text) { find("FAULT", text + where(warp, lane)); };
  if (descriptor < params || descriptor + sizeof(TensorMap) > params + u64(launch.param_bytes))
    return fault("the descriptor of a tensor copy is no parameter");
  memcpy(&copy.map, reinterpret_cast<const void*>(descriptor), sizeof(TensorMap));
  if (copy.map.magic != TENSOR_MAP_MAGIC) return fault("no tensor map at the descriptor's address");
  if (i32(copy.map.rank) != s.inst.mode) return fault("the tensor map is of another rank");
  copy.shared = s.shared_address(0, lane);
  copy.warp = warp.id;
  copy.pc = pc;
  for (int i = 0; i < s.inst.mode; i++) copy.coordinate[i] = i32(s.source<u32>((store ? 2 : 3) + i)[lane]);

  u32 bytes = copy.map.box[0] * copy.map.element_bytes;
  for (u32 d = 1; d < copy.map.rank; d++) bytes *= copy.map.box[d];
  if (copy.shared % 128) fault("shared address " + hex(copy.shared) + " of a tensor copy is not 128-byte aligned");
  if (copy.map.swizzle && copy.shared % (128u << copy.map.swizzle))
    find("NOTE", "shared address " + hex(copy.shared) + " of a swizzled copy is not aligned to its pattern" +
                     where(warp, lane));
  if (launch.count) counters().bytes += bytes;
  if (!inside(warp, copy.shared, bytes, lane)) return;

  if (store) {
    copy.group = warp.stores_committed + 1;
    tensor_rows(copy, [&](u32 shared, u64 address, u32 first, u32 end) {
      read_shared(warp, shared, 16, BULK_STORE + warp.id, u32(copy.group), true, lane);
      if (end > first) early(warp, address + first, end - first, true, lane);
    });
    if (launch.mode == EARLIEST) land_store(copy);
    warp.stores.push_back(copy);
    return;
  }
  copy.mbarrier = s.inst.target == 8 ? u32(s.source<u64>(2)[lane]) : s.source<u32>(2)[lane];
  auto found = mbarriers.find(copy.mbarrier);
  if (found == mbarriers.end() || !found->second.live)
    return fault("a tensor copy on an mbarrier that is not initialised");
  read_shared(warp, copy.mbarrier, 8, warp.id, warp.knowledge.happened[warp.id], false, lane);
  u32 offset = copy.mbarrier - base;
  if (first_unknown(&written[offset], &writer[offset], 8, warp.knowledge.fenced, CP_ASYNC) >= 0)
    find("PROXY_MBARRIER", "mbarrier " + hex(copy.mbarrier) + " was initialised through the generic proxy, with no " +
                               "fence.proxy.async before this copy signals it" + where(warp, lane));
  MBarrier& mbarrier = found->second;
  copy.clock = ++mbarrier.clock;
  tensor_rows(copy, [&](u32 shared, u64 address, u32 first, u32 end) {
    write_shared(warp, shared, 16, mbarrier.party, copy.clock, lane);
    if (end > first) global(warp, address + first, end - first, false, lane);
  });
  if (launch.mode == EARLIEST)
    land_load(copy);
  else
    loads.push_back(copy);
}

inline void Machine::land_load(const TensorCopy& load) {
  MBarrier& mbarrier = mbarriers[load.mbarrier];
  tensor_rows(load, [&](u32 to, u64 from, u32 first, u32 end) {
    memset(at(to), 0, 16);
    memcpy(at(to) + first, reinterpret_cast<const u8*>(from) + first, end - first);
    mbarrier.bytes -= 16;
  });
  u32& known = mbarrier.knowledge.happened[mbarrier.party];
  known = std::max(known, load.clock);
  turn_phase(mbarrier);
}

inline void Machine::turn_phase(MBarrier& mbarrier) {
  if (mbarrier.pending || mbarrier.bytes) return;
  mbarrier.phase++;
  mbarrier.pending = mbarrier.count;
}

inline void Machine::land_store(TensorCopy& store) {
  if (store.written) return;
  store.written = true;
  i32 executing = pc;
  pc = store.pc;  // to which what is found belongs
  tensor_rows(store, [&](u32 from, u64 to, u32 first, u32 end) {
    if (end > first && global(warps[store.warp], to + first, end - first, true, -1))
      memcpy(reinterpret_cast<u8*>(to) + first, at(from) + first, end - first);
  });
  pc = executing;
}

inline void Machine::land_stores(Warp& warp, i32 group) {
  group = std::max(group, warp.stores_done);
  auto landed = std::remove_if(warp.stores.begin(), warp.stores.end(), [&](TensorCopy& store) {
    if (store.group <= group) land_store(store);
    return store.group <= group;
  });
  warp.stores.erase(landed, warp.stores.end());
  warp.stores_done = group;
  warp.knowledge.happened[BULK_STORE + warp.id] = u32(group);
}

inline bool Machine::bulk(const Step& s) {
  Warp& warp = s.warp;
  const i32 behind = i32(s.inst.immediate);  // how many groups a wait leaves in flight
  switch (s.inst.op) {
    CASE(cpasync, issue_copies(s))
    case op_cpasync_commit:
      aligned(s, "cp.async.commit_group");
      warp.copies_committed++;
      return true;
    case op_cpasync_wait:
      aligned(s, "cp.async.wait_group");
      if (s.inst.mode) warp.copies_committed++;  // wait_all: what is not committed, too
      land_copies(warp, warp.copies_committed - behind);
      return true;
      CASE(tma_load, for_lanes(s.mask, [&](int lane) { issue_tensor_copy(s, lane, false); }))
      CASE(tma_store, for_lanes(s.mask, [&](int lane) { issue_tensor_copy(s, lane, true); }))
      CASE(bulk_commit, warp.stores_committed++)
      CASE(bulk_wait, land_stores(warp, warp.stores_committed - behind))
  }
  return false;
}

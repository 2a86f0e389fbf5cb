// The checker: bounds, and the happens-before order of shared memory by vector clocks.
//
// An access is in order only if a barrier, an mbarrier or the right wait orders it after the one before. What is asked
// is whether the party that accesses could know, not when things happened to run: so the verdict does not depend on the
// schedule.
#pragma once

#include "findings.h"

inline void Machine::forget_shared() {
  initialised.assign(size, 0);
  writer.assign(size, 0);
  written.assign(size, 0);
  for (auto& clocks : last_read) clocks.clear();
  readers.clear();
}

inline bool Machine::inside(Warp& warp, u32 address, u32 bytes, int lane) {
  if (address >= base && address - base + bytes <= size) return true;
  find("FAULT", "shared access of " + std::to_string(bytes) + " bytes at " + hex(address) + " outside the " +
                    std::to_string(size) + " bytes at " + hex(base) + where(warp, lane));
  return false;
}

// Whether any of n clocks is later than `known`.
inline bool any_later(const u32* clock, u32 n, u32 known) {
  u32 later = 0;
  if (n == 16) {  // most are: a loop of constant length becomes vector instructions
    for (u32 i = 0; i < 16; i++) later |= clock[i] > known;
  } else {
    for (u32 i = 0; i < n; i++) later |= clock[i] > known;
  }
  return later;
}

// The first of n bytes whose last write, by a party below `limit`, is later than what is known of that party; or -1.
inline int first_unknown(const u32* clock, const u8* writer, u32 n, const Clocks& known, int limit = PARTIES) {
  bool one_writer = true;
  for (u32 i = 1; i < n; i++) one_writer &= writer[i] == writer[0];
  if (one_writer && (writer[0] >= limit || !any_later(clock, n, known[writer[0]]))) return -1;
  for (u32 i = 0; i < n; i++)
    if (writer[i] < limit && clock[i] > known[writer[i]]) return int(i);
  return -1;
}

// A read by a warp, or on its behalf by `party` at `clock`; `async` through the asynchronous proxy.
inline bool Machine::read_shared(Warp& warp, u32 address, u32 bytes, int party, u32 clock, bool async, int lane) {
  if (!inside(warp, address, bytes, lane)) return false;
  u32 offset = address - base;
  const Knowledge& known = warp.knowledge;
  if (memchr(&initialised[offset], 0, bytes))
    find("UNINIT_SHARED", "reads shared bytes at " + hex(address) + " that nothing has written" + where(warp, lane));
  int i = first_unknown(&written[offset], &writer[offset], bytes, known.happened);
  if (i >= 0) {
    find("RACE", "read of shared " + hex(address + i) + " is not ordered after its write by " +
                     party_name(writer[offset + i]) + where(warp, lane));
  } else if (async && (i = first_unknown(&written[offset], &writer[offset], bytes, known.fenced, WGMMA)) >= 0) {
    int by = writer[offset + i];
    find(by < CP_ASYNC ? "PROXY" : "PROXY_CPASYNC", "async-proxy read of shared " + hex(address + i) + " written by " +
                                                        party_name(by) + ", with no fence.proxy.async between" +
                                                        where(warp, lane));
  }
  if (last_read[party].empty()) {
    last_read[party].assign(size, 0);
    readers.push_back(party);
  }
  std::fill_n(&last_read[party][offset], bytes, clock);
  return true;
}

// A write. `data`, where it is known, is what is written: the same again by another warp is no race that matters.
inline bool Machine::write_shared(Warp& warp, u32 address, u32 bytes, int party, u32 clock, int lane, const u8* data) {
  if (!inside(warp, address, bytes, lane)) return false;
  u32 offset = address - base;
  const Knowledge& known = warp.knowledge;
  auto race = [&](const std::string& after) {
    bool same = data && !memcmp(data, &shared[offset], bytes);
    find(same ? "SAME" : "RACE", "write of shared " + hex(address) + "+" + std::to_string(bytes) +
                                     " is not ordered after its " + after + where(warp, lane));
  };
  memset(&initialised[offset], 1, bytes);
  int i = first_unknown(&written[offset], &writer[offset], bytes, known.happened);
  if (i >= 0) {
    race("write by " + party_name(writer[offset + i]));
  } else if (party >= TENSOR_LOAD &&
             (i = first_unknown(&written[offset], &writer[offset], bytes, known.fenced, CP_ASYNC)) >= 0) {
    find("PROXY", "async-proxy write of shared " + hex(address + i) + " over what " + party_name(writer[offset + i]) +
                      " wrote through the generic proxy, with no fence.proxy.async between" + where(warp, lane));
  }
  for (int reader : readers) {
    if (reader != warp.id && any_later(&last_read[reader][offset], bytes, known.happened[reader]))
      race("read by " + party_name(reader));
  }
  std::fill_n(&written[offset], bytes, clock);
  memset(&writer[offset], party, bytes);
  return true;
}

inline bool Machine::global(Warp& warp, u64 address, u64 bytes, bool write, int lane) {
  auto holds = [&](i64 i) {
    return address >= launch.allocations[i].start && address + bytes <= launch.allocations[i].end;
  };
  i64 found = last_tensor;
  if (found >= launch.allocation_count || !holds(found))
    for (found = 0; found < launch.allocation_count && !holds(found);) found++;
  if (found < launch.allocation_count) {
    last_tensor = found;
    among_blocks(warp, found, address, bytes, write, lane);
    return lane < 0 || !early(warp, address, bytes, write, lane);  // a store that lands was looked at when it was issued
  }
  u64 least = ~0ull;
  std::string nearest = "none";
  for (i64 i = 0; i < launch.allocation_count; i++) {
    const Allocation& a = launch.allocations[i];
    u64 distance = address < a.start ? a.start - address : address >= a.end ? address - a.end + 1 : 0;
    if (distance >= least) continue;
    least = distance;
    nearest = "tensor #" + std::to_string(i) + " (" + std::to_string(a.end - a.start) + " bytes) at offset " +
              std::to_string(i64(address - a.start));
  }
  find("FAULT", std::string(write ? "global write" : "global read") + " of " + std::to_string(bytes) +
                    " bytes outside every tensor; nearest " + nearest + where(warp, lane));
  return false;
}

// A kernel that is launched programmatically may run beside those before it, until it has waited for them. Meanwhile it
// may read what no kernel writes, and nothing else: those before may yet write their results, and read what this one's
// results take the place of.
inline bool Machine::early(Warp& warp, u64 address, u64 bytes, bool write, int lane) {
  if (!launch.programmatic || warp.knowledge.grids || warp.waited >> lane & 1) return false;
  for (i64 i = 0; i < launch.allocation_count; i++) {
    const Allocation& a = launch.allocations[i];
    if ((a.constant && !write) || address >= a.end || address + bytes <= a.start) continue;
    find("EARLY", std::string(write ? "global write" : "global read") + " before griddepcontrol.wait, offset " +
                      std::to_string(i64(address - a.start)) + " of tensor #" + std::to_string(i) +
                      ": a kernel before this one may still be using it" + where(warp, lane));
    return true;
  }
  return false;
}

// Blocks run in any order and at the same time: one must not touch what another of the same launch writes.
inline void Machine::among_blocks(Warp& warp, i64 tensor, u64 address, u64 bytes, bool write, int lane) {
  std::vector<u32>& by = writing_block[tensor];
  if (by.empty() && !write) return;
  u64 start = launch.allocations[tensor].start;
  if (by.empty()) by.assign(launch.allocations[tensor].end - start, 0);
  u32* writers = &by[address - start];
  u32 self = u32(block) + 1, other = 0;
  for (u64 i = 0; i < bytes; i++)
    if (writers[i] && writers[i] != self) other = writers[i];
  if (other)
    find("BLOCKS", std::string(write ? "global write" : "global read") + " where block number " +
                       std::to_string(other - 1) + " of the same launch writes, offset " +
                       std::to_string(address - start) + " of tensor #" + std::to_string(tensor) + where(warp, lane));
  if (write) std::fill_n(writers, bytes, self);
}

// Loads and stores: parameters, global memory, shared memory.
#pragma once

#include "conversion.h"
#include "counting.h"
#include "order.h"

// How a load or store names its elements in `mode`; the width of their registers is in `extra`.
struct Elements {
  explicit Elements(const Inst& inst, int count)
      : bytes(inst.mode & 15), is_signed(inst.mode & 16), width(inst.extra), count(count) {}
  int bytes;
  bool is_signed;
  int width, count;

  u32 all() const { return u32(bytes * count); }
  u64 value(const u8* memory) const {
    u64 raw = 0;
    memcpy(&raw, memory, bytes);
    return is_signed ? sign_extended(raw, bytes) : raw;
  }
};

// What a load that must not happen gives: a value that shows.
constexpr u64 NOTHING = 0xcdcdcdcdcdcdcdcdull;

inline void Machine::load_param(const Step& s) {
  const Elements elements(s.inst, 1);
  for_lanes(s.mask, [&](int lane) {
    u64 offset = u64(s.inst.immediate);
    if (s.inst.sources) offset += s.inst.target == 8 ? s.source<u64>(0)[lane] : s.source<u32>(0)[lane];
    bool held = offset + elements.bytes <= u64(launch.param_bytes);
    if (!held) find("FAULT", "ld.param outside the parameters" + where(s.warp, lane));
    set_raw_register(s.result<u8>(0), elements.width, lane, held ? elements.value(launch.params + offset) : NOTHING);
  });
}

inline void Machine::global_access(const Step& s, bool store) {
  const Elements elements(s.inst, store ? s.inst.sources - 1 : s.inst.results);
  const u64* base_address = s.source<u64>(s.inst.sources - 1);
  const u32 bytes = elements.all();
  u64 addresses[32];
  for_lanes(s.mask, [&](int lane) {
    u64 address = addresses[lane] = base_address[lane] + u64(s.inst.immediate);
    if (address % bytes)
      find("FAULT", "misaligned global access of " + std::to_string(bytes) + " bytes at ..." + hex(address & 0xff) +
                        where(s.warp, lane));
    bool held = global(s.warp, address, bytes, store, lane);
    for (int i = 0; i < elements.count; i++) {
      u8* element = reinterpret_cast<u8*>(address) + i * elements.bytes;
      if (store) {
        u64 value = raw_register(s.source<u8>(i), elements.width, lane);
        if (held) memcpy(element, &value, elements.bytes);
      } else {
        set_raw_register(s.result<u8>(i), elements.width, lane, held ? elements.value(element) : NOTHING);
      }
    }
  });
  if (launch.count) count_sectors(s.mask, addresses, bytes);
}

inline void Machine::shared_load(const Step& s) {
  const Elements elements(s.inst, s.inst.results);
  const u32 bytes = elements.all();
  u32 addresses[32];
  // A result may be the register of the address: all addresses are taken before anything is loaded.
  for_lanes(s.mask, [&](int lane) { addresses[lane] = s.shared_address(s.inst.sources - 1, lane); });
  for_lanes(s.mask, [&](int lane) {
    u32 address = addresses[lane];
    if (address % bytes)
      find("FAULT",
           "misaligned shared access of " + std::to_string(bytes) + " bytes at " + hex(address) + where(s.warp, lane));
    bool held = read_shared(s.warp, address, bytes, s.warp.id, s.warp.knowledge.happened[s.warp.id], false, lane);
    for (int i = 0; i < elements.count; i++)
      set_raw_register(s.result<u8>(i), elements.width, lane,
                       held ? elements.value(at(address) + i * elements.bytes) : NOTHING);
  });
  if (launch.count) count_conflicts(s.mask, addresses, bytes);
}

inline void Machine::shared_store(const Step& s) {
  const Elements elements(s.inst, s.inst.sources - 1);
  const u32 bytes = elements.all();
  u32 addresses[32];
  u8 data[32][32];
  std::vector<int> order;  // of the lanes that hit shared memory
  for_lanes(s.mask, [&](int lane) {
    u32 address = addresses[lane] = s.shared_address(s.inst.sources - 1, lane);
    if (address % bytes)
      find("FAULT",
           "misaligned shared access of " + std::to_string(bytes) + " bytes at " + hex(address) + where(s.warp, lane));
    for (int i = 0; i < elements.count; i++) {
      u64 value = raw_register(s.source<u8>(i), elements.width, lane);
      memcpy(data[lane] + i * elements.bytes, &value, elements.bytes);
    }
    if (inside(s.warp, address, bytes, lane)) order.push_back(lane);
  });
  // Which of several lanes' writes to one address stays is undefined: an adversary's choice.
  if (launch.mode == RANDOM) std::shuffle(order.begin(), order.end(), random);
  for (size_t i = 0; i < order.size(); i++) {
    int lane = order[i];
    bool last = true;
    for (size_t j = i + 1; j < order.size(); j++) last &= addresses[order[j]] != addresses[lane];
    if (last)
      write_shared(s.warp, addresses[lane], bytes, s.warp.id, s.warp.knowledge.happened[s.warp.id], lane, data[lane]);
  }
  for (int lane : order) memcpy(at(addresses[lane]), data[lane], bytes);
  for (int lane : order) {
    if (!memcmp(at(addresses[lane]), data[lane], bytes)) continue;
    find("LANES", "lanes of one warp write different values to shared " + hex(addresses[lane]) +
                      ": which stays is undefined" + where(s.warp, lane));
    break;
  }
  if (launch.count) count_conflicts(s.mask, addresses, bytes);
}

// ldmatrix and stmatrix: matrices of 8 rows of 16 bytes, whose addresses come from 8 lanes each.
inline void Machine::matrix_access(const Step& s, bool store) {
  const int matrices = store ? s.inst.sources - 1 : s.inst.results;
  const bool transposed = s.inst.mode & 1;
  const u32 clock = s.warp.knowledge.happened[s.warp.id];
  u32 addresses[32], fragments[4][32] = {};
  aligned(s, store ? "stmatrix" : "ldmatrix");
  for (int lane = 0; lane < 8 * matrices; lane++) {
    addresses[lane] = s.shared_address(s.inst.sources - 1, lane);
    if (addresses[lane] % 16)
      find("FAULT", "misaligned row of a matrix at " + hex(addresses[lane]) + where(s.warp, lane));
  }
  for (int row = 0; row < 8 * matrices; row++) {
    u32 address = addresses[row];
    int matrix = row / 8, r = row % 8;
    u16 elements[8];
    auto of_lane = [&](int column) { return transposed ? column * 4 + r / 2 : r * 4 + column / 2; };
    auto shift_of = [&](int column) { return 16 * (transposed ? r & 1 : column & 1); };
    if (store) {
      const u32* values = s.source<u32>(matrix);
      for (int c = 0; c < 8; c++) elements[c] = u16(values[of_lane(c)] >> shift_of(c));
      if (write_shared(s.warp, address, 16, s.warp.id, clock, row, reinterpret_cast<u8*>(elements)))
        memcpy(at(address), elements, 16);
    } else if (read_shared(s.warp, address, 16, s.warp.id, clock, false, row)) {
      memcpy(elements, at(address), 16);
      for (int c = 0; c < 8; c++) fragments[matrix][of_lane(c)] |= u32(elements[c]) << shift_of(c);
    }
  }
  if (!store)
    for (int i = 0; i < matrices; i++) memcpy(s.result<u32>(i), fragments[i], sizeof fragments[i]);
  if (launch.count) count_conflicts(matrices == 4 ? ~0u : (1u << 8 * matrices) - 1, addresses, 16);
}

inline bool Machine::memory(const Step& s) {
  switch (s.inst.op) {
    CASE(ldparam, load_param(s))
    CASE(cvta_param, unary<u64>(s, [&](u64 offset) { return offset + reinterpret_cast<u64>(launch.params); }))
    CASE(ldg, global_access(s, false))
    CASE(stg, global_access(s, true))
    CASE(lds, shared_load(s))
    CASE(sts, shared_store(s))
    CASE(ldmatrix, matrix_access(s, false))
    CASE(stmatrix, matrix_access(s, true))
  }
  return false;
}

// What memory accesses cost: wavefronts of shared memory with their bank conflicts, sectors of global memory.
#pragma once

#include <algorithm>

#include "machine.h"

// A wavefront serves one word of 4 bytes from each of 32 banks. Wide accesses go by half or quarter warps.
inline void Machine::count_conflicts(u32 mask, const u32* address, u32 bytes) {
  Counters& counted = counters();
  int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int first = 0; first < 32; first += together) {
    u32 words[32][32];
    int in_bank[32] = {}, worst = 0;
    for (int lane = first; lane < first + together; lane++) {
      if (!(mask >> lane & 1)) continue;
      for (u32 byte = 0; byte < std::max(bytes, 4u); byte += 4) {
        u32 word = (address[lane] + byte) / 4, bank = word & 31;
        u32* end = words[bank] + in_bank[bank];
        if (std::find(words[bank], end, word) != end) continue;
        *end = word;
        worst = std::max(worst, ++in_bank[bank]);
      }
    }
    counted.wavefronts += worst;
    counted.ideal += worst > 0;
  }
  counted.bytes += u64(bytes) * __builtin_popcount(mask);
}

inline void Machine::count_sectors(u32 mask, const u64* address, u32 bytes) {
  u64 sectors[64];  // an access of at most 32 bytes, aligned to its size, touches one; a misaligned one two
  int n = 0;
  for_lanes(mask, [&](int lane) {
    sectors[n++] = address[lane] / 32;
    u64 last = (address[lane] + bytes - 1) / 32;
    if (last != sectors[n - 1]) sectors[n++] = last;
  });
  std::sort(sectors, sectors + n);
  counters().sectors += std::unique(sectors, sectors + n) - sectors;
  counters().bytes += u64(bytes) * __builtin_popcount(mask);
}

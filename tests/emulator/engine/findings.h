// What the checker has to say.
#pragma once

#include "machine.h"

inline std::string hex(u64 x) {
  char text[32];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(x));
  return text;
}

inline std::string party_name(int party) {
  if (party < CP_ASYNC) return "warp " + std::to_string(party);
  if (party < WGMMA) return "cp.async of warp " + std::to_string(party - CP_ASYNC);
  if (party < BULK_STORE) return "wgmma of warp " + std::to_string(party - WGMMA);
  if (party < TENSOR_LOAD) return "bulk store of warp " + std::to_string(party - BULK_STORE);
  return "tensor load of mbarrier #" + std::to_string(party - TENSOR_LOAD);
}

// One finding for each kind and instruction, with the text of the first.
inline void Machine::find(const char* kind, int at, const std::string& text) {
  findings.try_emplace({kind, at}, Finding{text, 0}).first->second.count++;
}

inline std::string Machine::where(const Warp& warp, int lane) const {
  std::string text = " [block ";
  for (i64 index : block_index) text += std::to_string(index) + ",";
  text.back() = ' ';
  text += "warp " + std::to_string(warp.id);
  return text + (lane >= 0 ? " lane " + std::to_string(lane) : "") + "]";
}

// PTX asks that all lanes execute these together.
inline void Machine::aligned(const Step& s, const char* what) {
  if (s.mask != ~s.warp.exited)
    find("FAULT", std::string(what) + " with lanes " + hex(s.mask) + " only" + where(s.warp));
}

inline std::string Machine::report() const {
  std::string text;
  for (const auto& [key, finding] : findings)
    text += key.first + "\t" + std::to_string(key.second) + "\t" + std::to_string(finding.count) + "\t" + finding.text +
            "\n";
  return text;
}

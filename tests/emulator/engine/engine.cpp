// The machine as a library: what machine.py calls.
#include "schedule.h"

extern "C" {

const char* operation_name(int i) { return i < operation_count ? OPERATION_NAMES[i] : nullptr; }

int instruction_bytes() { return sizeof(Inst); }

int max_warps() { return MAX_WARPS; }

// Returns the bytes of the report, which may be more than there is room for.
i64 run(Launch* launch) {
  Machine machine(*launch);
  const i64 blocks = launch->grid[0] * launch->grid[1] * launch->grid[2];
  const i64 end = std::min(blocks, launch->first_block + launch->block_count);
  for (i64 block = launch->first_block; block < end; block++) machine.run_block(block);
  machine.end_grid();
  launch->executed = machine.executed;
  std::string report = machine.report();
  snprintf(launch->report, launch->report_bytes, "%s", report.c_str());
  return i64(report.size());
}
}

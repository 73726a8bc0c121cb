// What a kernel found wrong with values the host cannot see (indices in device memory).
//
// A kernel that meets an index outside its range reports it, skips the access and goes on: the process and
// the CUDA context stay alive. The host looks at the word where it waits for results anyway.
#pragma once

#include <cstdint>

namespace ming {

enum class Fault : int32_t {
  none,
  page_table,  // a page outside the cache
  kv_length,   // more keys than the page table holds, or fewer than queries
  cu_seqlens,  // row offsets that fall or leave the tensor
  slot,        // a cache slot outside the pages
  expert,      // an expert id outside [0, experts)
  rows,        // a slot number outside the grouped rows
  offsets,     // expert offsets that fall or leave the rows
  modality,    // a router number outside [0, routers)
  media_row,   // a media row outside the tokens
  history,     // bounds of a sampling history outside it
  key_range,   // rows of keys outside the tensor, or more than a bias has columns
  bpe_id,      // a negative BPE audio id
  bpe_table,   // an expansion outside the table of codes
};

constexpr const char* fault_text(Fault fault) {
  switch (fault) {
    case Fault::page_table:
      return "page_table: expected pages inside the cache";
    case Fault::kv_length:
      return "kv_lens: expected lengths from the number of queries to what the page table holds";
    case Fault::cu_seqlens:
      return "cu_seqlens: expected rising offsets up to the number of rows";
    case Fault::slot:
      return "slots: expected slots inside the cache, or -1";
    case Fault::expert:
      return "topk_ids: expected experts from 0 to the number of experts - 1";
    case Fault::rows:
      return "rows: expected slot numbers below the number of rows";
    case Fault::offsets:
      return "offsets: expected ascending values from 0 to the number of rows";
    case Fault::modality:
      return "modality: expected values below the number of routers";
    case Fault::media_row:
      return "media_rows: expected rows below the number of tokens";
    case Fault::history:
      return "history_bounds: expected bounds inside the history";
    case Fault::key_range:
      return "keys: expected rows inside the keys, each with a column of the bias";
    case Fault::bpe_id:
      return "ids: expected BPE audio ids from 0";
    case Fault::bpe_table:
      return "table_offsets: expected rising offsets inside the table of codes";
    default:
      return "none";
  }
}

struct DeviceStatus {
  int32_t fault;  // the first Fault since the last look
  int32_t value;  // the offending value, cut to 32 bits
};

// One word per process in memory both sides see, made at the first launch that may report.
DeviceStatus* device_status();
// The word if there is one yet, else nullptr: asking touches no driver.
DeviceStatus* known_device_status();

}  // namespace ming

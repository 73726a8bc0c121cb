#include "ops/decode/decode.h"

#include "binding/check.h"

namespace ming::binding {
namespace {

void advance(py::object ids_, py::object positions_, py::object kv_lens_, py::object slots_,
             py::object page_table_, py::object history_, py::object bounds_, int32_t page_size) {
  Call call("advance");
  TensorView ids = call.tensor("ids", ids_, {DType::i64}, {"B"});
  TensorView positions = call.tensor("positions", positions_, {DType::i32}, {"3", "B"});
  TensorView kv_lens = call.tensor("kv_lens", kv_lens_, {DType::i32}, {"B"});
  TensorView slots = call.tensor("slots", slots_, {DType::i64}, {"B"});
  TensorView page_table = call.tensor("page_table", page_table_, {DType::i32}, {"B", "max_pages"});
  TensorView history = call.tensor("history", history_, {DType::i64}, {"L"});
  TensorView bounds = call.dense("history_bounds", bounds_, {DType::i64}, {"B", "2"});
  call.expect(page_size > 0, "page_size: expected at least 1, got " + std::to_string(page_size));
  AdvanceParams p{ids.ptr<int64_t>(),
                  positions.ptr<int32_t>(),
                  kv_lens.ptr<int32_t>(),
                  slots.ptr<int64_t>(),
                  page_table.ptr<int32_t>(),
                  history.ptr<int64_t>(),
                  bounds.ptr<int64_t>(),
                  ids.shape[0],
                  positions.stride[0],
                  page_table.stride[0],
                  page_table.shape[1],
                  history.shape[0],
                  page_size};
  for (int64_t b = 0; kReadsValues && b < p.rows; ++b) {
    const int64_t at = p.kv_lens[b], end = p.history_bounds[2 * b + 1];
    if (at < 0 || (p.slots[b] >= 0 && at / page_size >= p.max_pages))
      call.fail("kv_lens: expected 0 to " + std::to_string(p.max_pages * page_size - 1) + ", got " +
                std::to_string(at) + " in row " + std::to_string(b));
    if (end < 0 || end >= p.history_length)
      call.fail("history_bounds: expected an end from 0 to " + std::to_string(p.history_length - 1) +
                ", got " + std::to_string(end) + " in row " + std::to_string(b));
  }
  call.run(MING_KERNEL(advance), p);
}

}  // namespace

void register_decode(py::module_& m) {
  m.def("advance", &advance);
}

}  // namespace ming::binding

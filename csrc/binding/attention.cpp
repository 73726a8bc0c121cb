#include "ops/attention/attention.h"

#include <cmath>

#include "binding/check.h"

namespace ming::binding {
namespace {

// Row offsets of the sequences: 0 first, never falling, the number of rows last.
void check_offsets(const Call& call, const char* name, const TensorView& cu, int64_t rows) {
  const int64_t n = cu.shape[0];
  const std::string expected = std::string(name) + ": expected offsets from 0 to " + std::to_string(rows);
  call.expect(n > 1 || (n == 1 && rows == 0), expected);
  if (!kReadsValues) return;
  const int32_t* at = cu.ptr<int32_t>();
  call.expect(at[0] == 0 && at[n - 1] == rows, expected);
  for (int64_t i = 1; i < n; ++i)
    if (at[i] < at[i - 1])
      call.fail(std::string(name) + ": expected rising offsets, got a smaller one after " +
                std::to_string(at[i - 1]));
}

// The CPU form takes none.
int64_t workspace_bytes(int64_t rows, int64_t batch, int64_t heads, int64_t head_dim, int64_t max_keys) {
  return kReadsValues ? 0 : attention_workspace_bytes(rows, batch, heads, head_dim, max_keys);
}

AttentionParams heads_params(const Call& call, const TensorView& q, const TensorView& out, float scale) {
  AttentionParams p{};
  const int64_t heads = call.dim("Hq"), kv_heads = call.dim("Hkv");
  call.expect(kv_heads > 0 && heads % kv_heads == 0,
              "expected a number of query heads divisible by the KV heads, got " + std::to_string(heads) +
                  " and " + std::to_string(kv_heads));
  call.expect(scale > 0 && std::isfinite(scale), "expected a positive scale, got " + std::to_string(scale));
  call.expect(call.dim("D") > 0, "expected a head_dim above 0");
  p.q = q.data;
  p.out = out.data;
  p.q_token_stride = q.stride[0];
  p.q_head_stride = q.stride[1];
  p.out_token_stride = out.stride[0];
  p.out_head_stride = out.stride[1];
  p.rows = q.shape[0];
  p.num_heads = int32_t(heads);
  p.num_kv_heads = int32_t(kv_heads);
  p.head_dim = int32_t(call.dim("D"));
  p.scale = scale;
  p.dtype = q.dtype;
  return p;
}

// The rows of keys that each sequence sees: inside k, and not more than a bias has columns.
void check_keys(const Call& call, const TensorView& keys, int64_t rows, const TensorView& bias) {
  for (int64_t b = 0; kReadsValues && b < keys.shape[0]; ++b) {
    const int32_t first = keys.ptr<int32_t>()[2 * b], end = keys.ptr<int32_t>()[2 * b + 1];
    if (first < 0 || end < first || end > rows)
      call.fail("keys: expected rows from 0 to " + std::to_string(rows) + " for sequence " +
                std::to_string(b) + ", got " + std::to_string(first) + " to " + std::to_string(end));
    if (bias && end - first > bias.shape[2])
      call.fail("bias: expected a column for each of the " + std::to_string(end - first) +
                " keys of sequence " + std::to_string(b) + ", got " + std::to_string(bias.shape[2]));
  }
}

void attention_varlen(py::object q_, py::object k_, py::object v_, py::object cu_, float scale,
                      py::object keys_, py::object bias_, py::object out_) {
  Call call("attention_varlen");
  const char* const rows = keys_.is_none() ? "N" : "M";
  TensorView q = call.tensor("q", q_, {DType::f32, DType::bf16}, {"N", "Hq", "D"});
  TensorView k = call.tensor("k", k_, {q.dtype}, {rows, "Hkv", "D"});
  TensorView v = call.tensor("v", v_, {q.dtype}, {rows, "Hkv", "D"});
  TensorView cu = call.tensor("cu_seqlens", cu_, {DType::i32}, {"B+1"});
  call.bind("B", cu.shape[0] - 1);
  TensorView keys = keys_.is_none() ? TensorView{} : call.dense("keys", keys_, {DType::i32}, {"B", "2"});
  TensorView bias = call.optional("bias", bias_, {DType::f32}, {"Hq", "N", "K"});
  call.expect(keys || !bias, "bias: expected keys beside it");
  call.expect(!bias || bias.shape[2] > 0, "bias: expected at least one column");
  TensorView out = call.tensor("out", out_, {q.dtype}, {"N", "Hq", "D"});
  AttentionParams p = heads_params(call, q, out, scale);
  check_offsets(call, "cu_seqlens", cu, q.shape[0]);
  p.k = k.data;
  p.v = v.data;
  p.cu_q = cu.ptr<int32_t>();
  p.keys = keys.ptr<int32_t>();
  p.key_rows = k.shape[0];
  p.bias = bias.ptr<float>();
  p.bias_head_stride = bias.stride[0];
  p.bias_token_stride = bias.stride[1];
  p.bias_keys = bias.shape[2];
  p.k_token_stride = k.stride[0];
  p.k_head_stride = k.stride[1];
  p.v_token_stride = v.stride[0];
  p.v_head_stride = v.stride[1];
  p.batch = int32_t(cu.shape[0] - 1);
  if (keys) check_keys(call, keys, k.shape[0], bias);
  if (q.shape[0] == 0) return;
  call.run(MING_KERNEL(attention), p);
}

void attention_paged(py::object q_, py::object k_, py::object v_, py::object table_, py::object cu_,
                     py::object lens_, float scale, py::object out_, py::object workspace_) {
  Call call("attention_paged");
  TensorView q = call.tensor("q", q_, {DType::f32, DType::bf16}, {"N", "Hq", "D"});
  TensorView k = call.tensor("k_pages", k_, {q.dtype}, {"P", "Hkv", "page", "D"});
  TensorView v = call.tensor("v_pages", v_, {q.dtype}, {"P", "Hkv", "page", "D"});
  TensorView cu = call.tensor("cu_seqlens_q", cu_, {DType::i32}, {"B+1"});
  call.bind("B", cu.shape[0] - 1);
  TensorView table = call.tensor("page_table", table_, {DType::i32}, {"B", "maxp"});
  TensorView lens = call.tensor("kv_lens", lens_, {DType::i32}, {"B"});
  TensorView out = call.tensor("out", out_, {q.dtype}, {"N", "Hq", "D"});
  TensorView workspace = call.optional("workspace", workspace_, {DType::u8}, {"bytes"});
  AttentionParams p = heads_params(call, q, out, scale);
  check_offsets(call, "cu_seqlens_q", cu, q.shape[0]);
  const int64_t batch = call.dim("B"), pages = call.dim("P"), page = call.dim("page");
  for (int64_t b = 0; kReadsValues && b < batch; ++b) {
    const int64_t q_len = cu.ptr<int32_t>()[b + 1] - cu.ptr<int32_t>()[b], kv_len = lens.ptr<int32_t>()[b];
    if (kv_len < q_len || kv_len > table.shape[1] * page)
      call.fail("kv_lens: expected " + std::to_string(q_len) + " (the queries) to " +
                std::to_string(table.shape[1] * page) + " (the page table) for sequence " +
                std::to_string(b) + ", got " + std::to_string(kv_len));
    const int32_t* row = table.ptr<int32_t>() + b * table.stride[0];
    for (int64_t i = 0; i * page < kv_len; ++i)
      if (row[i] < 0 || row[i] >= pages)
        call.fail("page_table: expected pages from 0 to " + std::to_string(pages - 1) + " for sequence " +
                  std::to_string(b) + ", got " + std::to_string(row[i]));
  }
  const int64_t bytes = workspace_bytes(q.shape[0], batch, q.shape[1], q.shape[2], table.shape[1] * page);
  call.expect(workspace.shape[0] >= bytes, "workspace: expected " + std::to_string(bytes) + " bytes, got " +
                                               std::to_string(workspace.shape[0]));
  p.workspace = workspace.data;
  p.k = k.data;
  p.v = v.data;
  p.cu_q = cu.ptr<int32_t>();
  p.kv_lens = lens.ptr<int32_t>();
  p.page_table = table.ptr<int32_t>();
  p.page_table_stride = table.stride[0];
  p.page_size = page;
  p.pages = pages;
  p.max_pages = table.shape[1];
  p.k_page_stride = k.stride[0];
  p.k_head_stride = k.stride[1];
  p.k_token_stride = k.stride[2];
  p.v_page_stride = v.stride[0];
  p.v_head_stride = v.stride[1];
  p.v_token_stride = v.stride[2];
  p.batch = int32_t(batch);
  if (q.shape[0] == 0) return;
  // An empty table has no address, which would mean "not paged".
  call.expect(table.shape[1] > 0, "page_table: expected at least one page per sequence");
  call.run(MING_KERNEL(attention), p);
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention_varlen", &attention_varlen);
  m.def("attention_paged", &attention_paged);
  m.def("attention_workspace_bytes", &workspace_bytes);
}

}  // namespace ming::binding

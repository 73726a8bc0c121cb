#include "ops/rope/rope.h"

#include "binding/check.h"

namespace ming::binding {
namespace {

void rope_table(py::object positions_, py::object inv_freq_, py::object axis_, float scale, py::object cos_,
                py::object sin_) {
  Call call("rope_table");
  TensorView positions = call.tensor("positions", positions_, {DType::i32}, {"3", "N"});
  TensorView inv_freq = call.tensor("inv_freq", inv_freq_, {DType::f32}, {"F"});
  TensorView axis = call.tensor("axis", axis_, {DType::u8}, {"F"});
  TensorView cos = call.dense("cos", cos_, {DType::f32}, {"N", "F"});
  TensorView sin = call.dense("sin", sin_, {DType::f32}, {"N", "F"});
  if (kReadsValues)
    for (int64_t j = 0; j < axis.shape[0]; ++j)
      call.expect(axis.ptr<uint8_t>()[j] <= 2,
                  "axis: expected values 0, 1 or 2, got " + std::to_string(axis.ptr<uint8_t>()[j]));
  RopeTableParams p{positions.ptr<int32_t>(), inv_freq.ptr<float>(), axis.ptr<uint8_t>(),
                    cos.ptr<float>(),         sin.ptr<float>(),      positions.shape[1],
                    inv_freq.shape[0],        positions.stride[0],   scale};
  call.run(MING_KERNEL(rope_table), p);
}

// cos and sin [N, F] of N rows, with 2F within the head.
void check_tables(Call& call, py::object cos_, py::object sin_, TensorView* cos, TensorView* sin,
                  int64_t head_dim) {
  *cos = call.dense("cos", cos_, {DType::f32}, {"N", "F"});
  *sin = call.dense("sin", sin_, {DType::f32}, {"N", "F"});
  call.expect(2 * cos->shape[1] <= head_dim,
              "cos: expected at most head_dim / 2 = " + std::to_string(head_dim / 2) + " frequencies, got " +
                  std::to_string(cos->shape[1]));
}

void rope_append(py::object qkv_, py::object cos_, py::object sin_, py::object k_, py::object v_,
                 py::object slots_, py::object q_norm_, py::object k_norm_, float eps, py::object q_) {
  Call call("rope_append");
  TensorView qkv = call.tensor("qkv", qkv_, {DType::f32, DType::bf16}, {"N", "(Hq+2Hkv)*D"});
  TensorView k = call.dense("k_pages", k_, {DType::f32, DType::bf16}, {"P", "Hkv", "page", "D"});
  TensorView v = call.dense("v_pages", v_, {k.dtype}, {"P", "Hkv", "page", "D"});
  TensorView q = call.dense("q", q_, {qkv.dtype}, {"N", "Hq", "D"});
  call.bind("(Hq+2Hkv)*D", (call.dim("Hq") + 2 * call.dim("Hkv")) * call.dim("D"));
  TensorView cos, sin;
  check_tables(call, cos_, sin_, &cos, &sin, call.dim("D"));
  TensorView slots = call.tensor("slots", slots_, {DType::i64}, {"N"});
  TensorView q_norm = call.optional("q_norm", q_norm_, {qkv.dtype}, {"D"});
  TensorView k_norm = call.optional("k_norm", k_norm_, {qkv.dtype}, {"D"});
  call.expect(bool(q_norm) == bool(k_norm), "q_norm and k_norm are given together");
  const int64_t capacity = call.dim("P") * call.dim("page");
  call.expect(call.dim("page") >= 1 && capacity <= INT32_MAX, "k_pages: expected 1 to 2^31 - 1 slots");
  if (kReadsValues)
    for (int64_t n = 0; n < slots.shape[0]; ++n) {
      const int64_t slot = slots.ptr<int64_t>()[n];
      if (slot < -1 || slot >= capacity)
        call.fail("slots: expected values from 0 to " + std::to_string(capacity - 1) + " or -1, got " +
                  std::to_string(slot));
    }
  RopeAppendParams p{};
  p.qkv = qkv.data;
  p.cos = cos.ptr<float>();
  p.sin = sin.ptr<float>();
  p.k_pages = k.data;
  p.v_pages = v.data;
  p.slots = slots.ptr<int64_t>();
  p.q_norm = q_norm.data;
  p.k_norm = k_norm.data;
  p.q = q.data;
  p.tokens = qkv.shape[0];
  p.freqs = cos.shape[1];
  p.heads = call.dim("Hq");
  p.kv_heads = call.dim("Hkv");
  p.head_dim = call.dim("D");
  p.page_size = call.dim("page");
  p.pages = call.dim("P");
  p.qkv_stride = qkv.stride[0];
  p.eps = eps;
  p.dtype = qkv.dtype;
  p.page_dtype = k.dtype;
  call.run(MING_KERNEL(rope_append), p);
}

void rope_qk(py::object qkv_, py::object cos_, py::object sin_, int64_t num_heads) {
  Call call("rope_qk_");
  TensorView qkv = call.tensor("qkv", qkv_, {DType::f32, DType::bf16}, {"N", "QKV"});
  call.expect(num_heads > 0 && num_heads <= qkv.shape[1] && qkv.shape[1] % (3 * num_heads) == 0,
              "qkv: expected rows of 3 * " + std::to_string(num_heads) + " heads, got " +
                  std::to_string(qkv.shape[1]) + " values");
  const int64_t head_dim = qkv.shape[1] / (3 * num_heads);
  TensorView cos, sin;
  check_tables(call, cos_, sin_, &cos, &sin, head_dim);
  RopeQkParams p{qkv.data,  cos.ptr<float>(), sin.ptr<float>(), qkv.shape[0], cos.shape[1],
                 num_heads, head_dim,         qkv.stride[0],    qkv.dtype};
  call.run(MING_KERNEL(rope_qk), p);
}

}  // namespace

void register_rope(py::module_& m) {
  m.def("rope_table", &rope_table);
  m.def("rope_append", &rope_append);
  m.def("rope_qk_", &rope_qk);
}

}  // namespace ming::binding

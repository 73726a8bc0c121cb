#include "ops/sampling/sampling.h"

#include <cmath>

#include "binding/check.h"

namespace ming::binding {
namespace {

template <typename T, typename Good>
void check_rows(const Call& call, const char* name, const TensorView& t, const char* expected, Good&& good) {
  if (!kReadsValues) return;
  for (int64_t i = 0; i < t.shape[0]; ++i)
    if (!good(t.ptr<T>()[i]))
      call.fail(std::string(name) + ": expected " + expected + ", got " + std::to_string(t.ptr<T>()[i]) +
                " in row " + std::to_string(i));
}

void sample(py::object logits_, py::object temperature_, py::object top_k_, py::object top_p_,
            py::object penalty_, py::object ngram_, py::object history_, py::object bounds_,
            py::object uniforms_, py::object ids_, py::object logprob_, py::object top_ids_,
            py::object top_logprob_, py::object workspace_) {
  Call call("sample");
  TensorView logits = call.tensor("logits", logits_, {DType::f32}, {"B", "V"});
  TensorView temperature = call.tensor("temperature", temperature_, {DType::f32}, {"B"});
  TensorView top_k = call.tensor("top_k", top_k_, {DType::i32}, {"B"});
  TensorView top_p = call.tensor("top_p", top_p_, {DType::f32}, {"B"});
  TensorView penalty = call.tensor("repetition_penalty", penalty_, {DType::f32}, {"B"});
  TensorView ngram = call.tensor("no_repeat_ngram_size", ngram_, {DType::i32}, {"B"});
  TensorView uniforms = call.tensor("uniforms", uniforms_, {DType::f32}, {"B"});
  TensorView history = call.tensor("history", history_, {DType::i64}, {"L"});
  TensorView bounds = call.dense("history_bounds", bounds_, {DType::i64}, {"B", "2"});
  TensorView ids = call.tensor("ids", ids_, {DType::i64}, {"B"});
  TensorView logprob = call.tensor("logprob", logprob_, {DType::f32}, {"B"});
  TensorView top_ids = call.dense("top_ids", top_ids_, {DType::i64}, {"B", "n"});
  TensorView top_logprob = call.dense("top_logprob", top_logprob_, {DType::f32}, {"B", "n"});
  TensorView workspace = call.optional("workspace", workspace_, {DType::u8}, {"bytes"});
  const int64_t rows = logits.shape[0], vocab = logits.shape[1], n = top_ids.shape[1];
  call.expect(vocab > 0 && vocab < (int64_t(1) << 31), "logits: expected 1 to 2^31 - 1 columns");
  call.expect(n <= vocab,
              "n_logprobs: expected at most " + std::to_string(vocab) + ", got " + std::to_string(n));
  check_rows<float>(call, "temperature", temperature, "a finite number of at least 0",
                    [](float x) { return x >= 0 && std::isfinite(x); });
  check_rows<int32_t>(call, "top_k", top_k, "at least 0", [](int32_t x) { return x >= 0; });
  check_rows<float>(call, "top_p", top_p, "above 0 and at most 1", [](float x) { return x > 0 && x <= 1; });
  check_rows<float>(call, "repetition_penalty", penalty, "a finite number above 0",
                    [](float x) { return x > 0 && std::isfinite(x); });
  check_rows<int32_t>(call, "no_repeat_ngram_size", ngram, "at least 0", [](int32_t x) { return x >= 0; });
  check_rows<float>(call, "uniforms", uniforms, "0 to 1", [](float x) { return x >= 0 && x <= 1; });
  const int64_t* at = bounds.ptr<int64_t>();
  for (int64_t i = 0; kReadsValues && i < rows; ++i)
    if (at[2 * i] < 0 || at[2 * i] > at[2 * i + 1] || at[2 * i + 1] > history.shape[0])
      call.fail("history_bounds: expected begin <= end within 0 to " + std::to_string(history.shape[0]) +
                ", got " + std::to_string(at[2 * i]) + ", " + std::to_string(at[2 * i + 1]) + " in row " +
                std::to_string(i));
  call.expect(kReadsValues || workspace.shape[0] >= sample_workspace_bytes(rows, vocab),
              "workspace: expected " + std::to_string(sample_workspace_bytes(rows, vocab)) + " bytes");
  SampleParams p{logits.ptr<float>(),
                 temperature.ptr<float>(),
                 top_k.ptr<int32_t>(),
                 top_p.ptr<float>(),
                 penalty.ptr<float>(),
                 ngram.ptr<int32_t>(),
                 history.ptr<int64_t>(),
                 at,
                 uniforms.ptr<float>(),
                 ids.ptr<int64_t>(),
                 logprob.ptr<float>(),
                 top_ids.ptr<int64_t>(),
                 top_logprob.ptr<float>(),
                 rows,
                 vocab,
                 logits.stride[0],
                 history.shape[0],
                 int32_t(n),
                 workspace.data};
  call.run(MING_KERNEL(sample), p);
}

void ngram_bans(py::object history_, int32_t n, py::object banned_) {
  Call call("ngram_bans");
  TensorView history = call.tensor("history", history_, {DType::i64}, {"L"});
  TensorView banned = call.tensor("banned", banned_, {DType::u8}, {"V"});
  call.expect(n >= 0, "n: expected at least 0, got " + std::to_string(n));
  NgramBansParams p{history.ptr<int64_t>(), banned.ptr<uint8_t>(), history.shape[0], banned.shape[0], n};
  call.run(MING_KERNEL(ngram_bans), p);
}

}  // namespace

void register_sampling(py::module_& m) {
  m.def("sample", &sample);
  m.def("sample_workspace_bytes", [](int64_t rows, int64_t vocab) {
    return kReadsValues ? int64_t(0) : sample_workspace_bytes(rows, vocab);
  });
  m.def("ngram_bans", &ngram_bans);
}

}  // namespace ming::binding

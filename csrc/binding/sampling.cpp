#include "ops/sampling/sampling.h"

#include <cmath>

#include "binding/check.h"

namespace ming::binding {
namespace {

template <typename T, typename Good>
void check_rows(const Call& call, const char* name, const TensorView& t, const char* expected, Good&& good) {
  for (int64_t i = 0; i < t.shape[0]; ++i)
    if (!good(t.ptr<T>()[i]))
      call.fail(std::string(name) + ": expected " + expected + ", got " + std::to_string(t.ptr<T>()[i]) +
                " in row " + std::to_string(i));
}

void sample(py::object logits_, py::object temperature_, py::object top_k_, py::object top_p_,
            py::object penalty_, py::object ngram_, py::object history_, py::object offsets_,
            py::object uniforms_, py::object ids_, py::object logprob_, py::object top_ids_,
            py::object top_logprob_) {
  Call call("sample");
  TensorView logits = call.tensor("logits", logits_, {DType::f32}, {"B", "V"});
  TensorView temperature = call.tensor("temperature", temperature_, {DType::f32}, {"B"});
  TensorView top_k = call.tensor("top_k", top_k_, {DType::i32}, {"B"});
  TensorView top_p = call.tensor("top_p", top_p_, {DType::f32}, {"B"});
  TensorView penalty = call.tensor("repetition_penalty", penalty_, {DType::f32}, {"B"});
  TensorView ngram = call.tensor("no_repeat_ngram_size", ngram_, {DType::i32}, {"B"});
  TensorView uniforms = call.tensor("uniforms", uniforms_, {DType::f32}, {"B"});
  TensorView history = call.tensor("history", history_, {DType::i64}, {"L"});
  TensorView offsets = call.tensor("history_offsets", offsets_, {DType::i64}, {"B+1"});
  TensorView ids = call.tensor("ids", ids_, {DType::i64}, {"B"});
  TensorView logprob = call.tensor("logprob", logprob_, {DType::f32}, {"B"});
  TensorView top_ids = call.dense("top_ids", top_ids_, {DType::i64}, {"B", "n"});
  TensorView top_logprob = call.dense("top_logprob", top_logprob_, {DType::f32}, {"B", "n"});
  const int64_t rows = logits.shape[0], vocab = logits.shape[1], n = top_ids.shape[1];
  call.bind("B+1", rows + 1);
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
  const int64_t* at = offsets.ptr<int64_t>();
  bool rising = at[0] == 0 && at[rows] == history.shape[0];
  for (int64_t i = 0; i < rows; ++i) rising &= at[i] <= at[i + 1];
  call.expect(rising,
              "history_offsets: expected rising offsets from 0 to " + std::to_string(history.shape[0]));
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
                 int32_t(n)};
  {
    py::gil_scoped_release release;
    cpu::sample(p);
  }
  std::string bad;
  for (int64_t i = 0; i < rows; ++i)
    if (p.ids[i] < 0) bad += (bad.empty() ? "" : ", ") + std::to_string(i);
  call.expect(bad.empty(),
              "logits: expected no NaN or +inf and a finite value to choose, not so in row " + bad);
}

void ngram_bans(py::object history_, int32_t n, py::object banned_) {
  Call call("ngram_bans");
  TensorView history = call.tensor("history", history_, {DType::i64}, {"L"});
  TensorView banned = call.tensor("banned", banned_, {DType::u8}, {"V"});
  call.expect(n >= 0, "n: expected at least 0, got " + std::to_string(n));
  NgramBansParams p{history.ptr<int64_t>(), banned.ptr<uint8_t>(), history.shape[0], banned.shape[0], n};
  py::gil_scoped_release release;
  cpu::ngram_bans(p);
}

}  // namespace

void register_sampling(py::module_& m) {
  m.def("sample", &sample);
  m.def("ngram_bans", &ngram_bans);
}

}  // namespace ming::binding

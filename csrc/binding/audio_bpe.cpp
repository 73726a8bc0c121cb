#include "ops/audio_bpe/audio_bpe.h"

#include <climits>

#include "binding/packed.h"

namespace ming::binding {
namespace {

// Row offsets that rise and stay within [0, end].
void rising(Call& call, const char* name, const int32_t* values, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < (i > 0 ? values[i - 1] : 0) || values[i] > end)
      call.fail(std::string(name) + ": expected rising offsets from 0 to " + std::to_string(end) + ", got " +
                std::to_string(values[i]));
}

void audio_bpe_decode(py::object ids_, py::object cu_ids_, py::object offsets_, py::object table_,
                      int32_t longest, py::object codes_, py::object cu_codes_, py::object workspace_) {
  Call call("audio_bpe_decode");
  TensorView ids = call.tensor("ids", ids_, {DType::i64}, {"N"});
  TensorView cu_ids = call.tensor("cu_ids", cu_ids_, {DType::i32}, {"B + 1"});
  TensorView offsets = call.tensor("table_offsets", offsets_, {DType::i32}, {"V + 1"});
  TensorView table = call.tensor("table_codes", table_, {DType::i32}, {"C"});
  TensorView codes = call.tensor("codes", codes_, {DType::i32}, {"N * longest"});
  TensorView cu_codes = call.tensor("cu_codes", cu_codes_, {DType::i32}, {"B + 1"});
  TensorView workspace = call.optional("workspace", workspace_, {DType::i32}, {"tiles"});
  const int64_t tokens = ids.shape[0], vocab = offsets.shape[0] - 1, tiles = audio_bpe_tiles(tokens);
  call.expect(cu_ids.shape[0] >= 1 && vocab >= 0, "expected cu_ids [B + 1] and table_offsets [V + 1]");
  call.expect(
      longest >= 0 && tokens <= INT32_MAX / (longest + int64_t(1)),
      "expected N * longest below 2^31, got " + std::to_string(tokens) + " * " + std::to_string(longest));
  call.expect(codes.shape[0] == tokens * longest, "codes: expected N * longest places");
  call.expect(kReadsValues || workspace.shape[0] >= tiles,
              "workspace: expected " + std::to_string(tiles) + " numbers");
  AudioBpeDecodeParams p{ids.ptr<int64_t>(),       cu_ids.ptr<int32_t>(),
                         offsets.ptr<int32_t>(),   table.ptr<int32_t>(),
                         codes.ptr<int32_t>(),     cu_codes.ptr<int32_t>(),
                         workspace.ptr<int32_t>(), tokens,
                         cu_ids.shape[0] - 1,      vocab,
                         table.shape[0],           longest};
  if (kReadsValues) {
    rising(call, "cu_ids", p.cu_ids, p.rows + 1, tokens);
    for (int64_t n = 0; n < tokens; ++n) {
      const int64_t id = p.ids[n];
      if (id < 0) call.fail("ids: expected ids from 0, got " + std::to_string(id));
      if (id >= vocab) continue;
      const int64_t begin = p.table_offsets[id], end = p.table_offsets[id + 1];
      if (begin < 0 || end < begin || end > p.table_size || end - begin > longest)
        call.fail("table_offsets: expected up to " + std::to_string(longest) + " codes of table_codes, got " +
                  std::to_string(begin) + " to " + std::to_string(end) + " for id " + std::to_string(id));
    }
  }
  call.run(MING_KERNEL(audio_bpe_decode), p);
}

#if !MING_BACKEND_CUDA
void audio_bpe_encode(py::object codes_, py::object cu_codes_, py::object symbols_, py::object starts_,
                      py::object right_, py::object rank_, py::object merged_, py::object ids_,
                      py::object cu_ids_) {
  Call call("audio_bpe_encode");
  TensorView codes = call.tensor("codes", codes_, {DType::i32}, {"N"});
  TensorView cu_codes = call.tensor("cu_codes", cu_codes_, {DType::i32}, {"B + 1"});
  TensorView symbols = call.tensor("symbols", symbols_, {DType::i32}, {"codes"});
  TensorView starts = call.tensor("pair_starts", starts_, {DType::i32}, {"V + 1"});
  TensorView right = call.tensor("pair_right", right_, {DType::i32}, {"M"});
  TensorView rank = call.tensor("pair_rank", rank_, {DType::i32}, {"M"});
  TensorView merged = call.tensor("pair_merged", merged_, {DType::i32}, {"M"});
  TensorView ids = call.tensor("ids", ids_, {DType::i64}, {"N"});
  TensorView cu_ids = call.tensor("cu_ids", cu_ids_, {DType::i32}, {"B + 1"});
  const int64_t count = codes.shape[0], pairs = right.shape[0], vocab = starts.shape[0] - 1;
  call.expect(cu_codes.shape[0] >= 1 && vocab >= 0, "expected cu_codes [B + 1] and pair_starts [V + 1]");
  call.expect(count <= INT32_MAX / 4, "codes: expected fewer than 2^29");
  AudioBpeEncodeParams p{codes.ptr<int32_t>(),  cu_codes.ptr<int32_t>(), symbols.ptr<int32_t>(),
                         starts.ptr<int32_t>(), right.ptr<int32_t>(),    rank.ptr<int32_t>(),
                         merged.ptr<int32_t>(), ids.ptr<int64_t>(),      cu_ids.ptr<int32_t>(),
                         cu_codes.shape[0] - 1};
  rising(call, "cu_codes", p.cu_codes, p.rows + 1, count);
  in_range(call, "codes", p.codes, count, symbols.shape[0]);
  for (int64_t i = 0; i < symbols.shape[0]; ++i)
    if (p.symbols[i] < -1 || p.symbols[i] >= vocab) call.fail("symbols: expected ids below V, or -1");
  rising(call, "pair_starts", p.pair_starts, vocab + 1, pairs);
  in_range(call, "pair_merged", p.pair_merged, pairs, vocab);
  in_range(call, "pair_rank", p.pair_rank, pairs, INT32_MAX);
  call.run(MING_KERNEL(audio_bpe_encode), p);
}
#endif

}  // namespace

void register_audio_bpe(py::module_& m) {
  m.def("audio_bpe_decode", &audio_bpe_decode);
#if MING_BACKEND_CUDA
  m.def("audio_bpe_tiles", &audio_bpe_tiles);
#else
  m.def("audio_bpe_encode", &audio_bpe_encode);
#endif
}

}  // namespace ming::binding

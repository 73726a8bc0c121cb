#include "ops/embed/embed.h"

#include "binding/check.h"

namespace ming::binding {
namespace {

void embed(py::object ids_, py::object table_, py::object media_rows_, py::object media_feats_,
           py::object y_) {
  Call call("embed");
  TensorView ids = call.tensor("ids", ids_, {DType::i64}, {"N"});
  TensorView table = call.tensor("table", table_, {DType::f32, DType::bf16}, {"V", "H"});
  TensorView rows = call.optional("media_rows", media_rows_, {DType::i64}, {"M"});
  TensorView feats = call.optional("media_feats", media_feats_, {table.dtype}, {"M", "H"});
  TensorView y = call.dense("y", y_, {table.dtype}, {"N", "H"});
  call.expect(table.shape[0] >= 1, "table: expected at least one row");
  call.expect(bool(rows) == bool(feats), "media_rows and media_feats are given together");
  if (kReadsValues)
    for (int64_t m = 0; m < rows.shape[0]; ++m) {
      const int64_t row = rows.ptr<int64_t>()[m];
      call.expect(row >= 0 && row < ids.shape[0], "media_rows: expected rows from 0 to " +
                                                      std::to_string(ids.shape[0] - 1) + ", got " +
                                                      std::to_string(row));
    }
  EmbedParams p{ids.ptr<int64_t>(), table.data,     rows.ptr<int64_t>(), feats.data,    y.data,
                ids.shape[0],       table.shape[0], table.shape[1],      rows.shape[0], table.stride[0],
                feats.stride[0],    table.dtype};
  call.run(MING_KERNEL(embed), p);
}

}  // namespace

void register_embed(py::module_& m) {
  m.def("embed", &embed);
}

}  // namespace ming::binding

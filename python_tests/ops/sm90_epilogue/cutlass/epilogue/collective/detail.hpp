// Stands in for CUTLASS' header, which g++ cannot read.
namespace cutlass::epilogue::collective::detail {
template <class Epilogue>
struct Sm90TmaWarpSpecializedAdapter {};
}  // namespace cutlass::epilogue::collective::detail

// Stands in for CUTLASS' header, which g++ cannot read.
namespace cutlass::epilogue {
struct PtrArrayNoSmemWarpSpecialized {};
}  // namespace cutlass::epilogue

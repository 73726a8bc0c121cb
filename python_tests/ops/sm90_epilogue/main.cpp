// Runs the epilogue of the Hopper grouped products on the CPU, a thread of the CPU per thread of the block.
//
// The accumulators are filled from the layout that PTX documents for wgmma m64nNk16 (not from CuTe, which the
// epilogue asks): thread t holds rows 16 * (t / 32) + t % 32 / 4 and 8 below, columns 8 j + 2 * (t % 4) and
// the next.
#include <cuda_runtime.h>
#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <random>
#include <thread>
#include <vector>

#include "ops/moe/sm90/epilogue.cuh"

using namespace cute;
using ming::bf16;

constexpr uint16_t kUntouched = 0x7fc1;
constexpr int kColumns = 256, kBadPlace = 3;

thread_local int self;
pthread_barrier_t barriers[8];
uint32_t words[8][32];

uint32_t exchange(uint32_t value, int bits) {
  const int warp = self / 32, lane = self % 32;
  words[warp][lane] = value;
  pthread_barrier_wait(&barriers[warp]);
  const uint32_t other = words[warp][lane ^ bits];
  pthread_barrier_wait(&barriers[warp]);
  return other;
}

template <bool Gated, int WarpGroups>
int wrong_values(const std::vector<int>& counts, int n) {
  using Atom = SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>;
  const auto mma = make_tiled_mma(Atom{}, Layout<Shape<Int<WarpGroups>, _1, _1>>{});
  constexpr int kRows = 64 * WarpGroups;
  const auto block = Shape<Int<kRows>, Int<kColumns>, _64>{};
  const int experts = int(counts.size()), columns = Gated ? 2 * n : n, stride = n + 8;
  std::vector<int32_t> offsets(experts + 1, 0);
  for (int e = 0; e < experts; ++e) offsets[e + 1] = offsets[e] + counts[e];
  const int slots = offsets[experts];
  std::mt19937 random(1);
  std::vector<int32_t> rows(slots);
  for (int i = 0; i < slots; ++i) rows[i] = i;
  std::shuffle(rows.begin(), rows.end(), random);
  const int left_out = Gated ? kBadPlace : rows[kBadPlace];  // the row of y of a place that names no slot
  rows[kBadPlace] = slots;
  std::normal_distribution<float> normal;
  std::vector<float> products(size_t(slots) * columns);
  for (float& value : products) value = normal(random);
  std::vector<bf16> y(size_t(slots) * stride, bf16{kUntouched});
  ming::DeviceStatus status{};
  using Epilogue = ming::cuda::sm90::RowEpilogue<Gated>;
  const typename Epilogue::Params params{rows.data(), offsets.data(), y.data(), slots, stride, n, &status};

  for (int e = 0; e < experts; ++e)
    for (int tile_m = 0; tile_m * kRows < counts[e]; ++tile_m)
      for (int tile_n = 0; tile_n * kColumns < columns; ++tile_n) {
        std::vector<std::thread> threads;
        for (int t = 0; t < 128 * WarpGroups; ++t)
          threads.emplace_back([&, t] {
            self = t;
            auto sums = partition_fragment_C(mma, take<0, 2>(block));
            for (int j = 0; j < kColumns / 8; ++j)
              for (int h = 0; h < 2; ++h)
                for (int pair = 0; pair < 2; ++pair) {
                  const int row = tile_m * kRows + 16 * (t / 32) + t % 32 / 4 + 8 * h;
                  const int column = tile_n * kColumns + 8 * j + 2 * (t % 4) + pair;
                  const bool inside = row < counts[e] && column < columns;
                  sums(make_coord(make_coord(pair, h, j), 0, 0)) =
                      inside ? products[size_t(offsets[e] + row) * columns + column] : NAN;
                }
            Epilogue epilogue(params);
            epilogue(make_shape(counts[e], columns, 64, 1), block, make_coord(tile_m, tile_n, _, e), sums,
                     mma, 0, t, nullptr);
          });
        for (auto& thread : threads) thread.join();
      }

  int wrong = status.fault != int32_t(ming::Fault::rows);
  for (int place = 0; place < slots; ++place)
    for (int c = 0; c < stride; ++c) {
      const bool bad = place == kBadPlace;
      const int row = Gated ? place : bad ? left_out : rows[place];
      const float* const product = &products[size_t(place) * columns];
      uint16_t expected = kUntouched;
      if (c < n && !bad)
        expected =
            ming::to_bf16(Gated ? ming::cuda::sm90::swiglu(product[2 * c], product[2 * c + 1]) : product[c])
                .bits;
      wrong += y[size_t(row) * stride + c].bits != expected;
    }
  std::printf("gated %d, %d rows a tile, %d outputs: %d wrong\n", Gated, kRows, n, wrong);
  return wrong;
}

int main() {
  for (auto& barrier : barriers) pthread_barrier_init(&barrier, nullptr, 32);
  int wrong = 0;
  for (int n : {8, 136, 392}) {
    wrong += wrong_values<false, 1>({5, 0, 70}, n) + wrong_values<true, 1>({5, 0, 70}, n);
    wrong += wrong_values<false, 2>({5, 130, 0}, n) + wrong_values<true, 2>({5, 130, 0}, n);
  }
  return wrong != 0;
}

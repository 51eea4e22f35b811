// What an adapter of low rank adds to a product: up(scale * down(x)), with the roundings of three
// operations on bfloat16 tensors. Sums have one order for any number of rows, so that decoding and
// training add the same bits.
//
// Layers whose outputs stand side by side have one matrix down, their inner states behind each
// other, and one matrix up, of which each output takes the inner states of its own layer.
//
// Letters: N rows, K inputs, O outputs, R inner states of all layers (whole vectors), r of one
// layer.
#pragma once

#include "pairs.h"

namespace rlprompt {

constexpr int64_t kRows = 16;  // of one task

// Calls body(count, first) for `rows` rows in runs of kMost and its halves; the count is a
// constant.
template <int kMost, typename F>
inline void in_runs(int64_t rows, const F& body, int64_t first = 0) {
  for (; first + kMost <= rows; first += kMost)
    body(std::integral_constant<int, kMost>{}, first);
  if constexpr (kMost > 1) in_runs<kMost / 2>(rows, body, first);
}

// C [m, n] (+)= A [m, 2 k] B [2 k, n], as `product`; with 16 sums at once where m is 8 or more.
inline void narrow_product(int64_t m, int64_t n, int64_t k, const uint32_t* a, int64_t row_a,
                           int64_t col_a, const Right& b, float* c, int64_t ldc, Into into) {
  const auto rows_of = [&](auto vectors, int64_t j) {
    constexpr int kVectors = decltype(vectors)::value;
    in_runs<16 / kVectors>(m, [&](auto count, int64_t i) {
      tile<decltype(count)::value, kVectors>(k, a + i * row_a, row_a, col_a, b.from(j),
                                             c + i * ldc + j, ldc, into);
    });
  };
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) rows_of(std::integral_constant<int, 2>{}, j);
  if (j < n) rows_of(std::integral_constant<int, 1>{}, j);
}

struct Addition {
  const uint32_t* inner = nullptr;  // [N, R / 2], pairs of inner states
  const uint32_t* up;     // [r / 2, O], pairs along the inner states of a layer
  const int32_t* starts;  // [O / kLanes], the pair of inner states that they begin at; -1 = nothing
  int64_t width, rank, outputs;  // R / 2, r / 2, O

  // Asks for what `add` reads of kLanes outputs: it stands too far apart for the hardware to guess.
  void prefetch(int64_t column) const {
    for (int64_t p = 0; p < rank; ++p) __builtin_prefetch(up + p * outputs + column);
  }

  // To MR rows of kLanes or 2 * kLanes outputs, which stand at `out` with a stride between rows.
  template <int MR>
  void add(int64_t row, int64_t column, int64_t count, bf16* out, int64_t stride) const {
    const int32_t* start = starts + column / kLanes;
    if (count == 2 * kLanes && start[0] == start[1]) return add<MR, 2>(row, column, out, stride);
    for (int64_t j = 0; j < count; j += kLanes) add<MR, 1>(row, column + j, out + j, stride);
  }

 private:
  // To NV vectors of outputs that take the same inner states.
  template <int MR, int NV>
  void add(int64_t row, int64_t column, bf16* out, int64_t stride) const {
    const int32_t start = starts[column / kLanes];
    if (start < 0) return;
    alignas(64) float sums[MR * NV * kLanes];
    tile<MR, NV>(rank, inner + row * width + start, width, 1, {up + column, outputs}, sums,
                 NV * kLanes, Into::kFresh);
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV * kLanes; j += kLanes) {
        bf16* to = out + i * stride + j;
        store(to, load(to) + rounded<bf16>(load(sums + i * NV * kLanes + j)));
      }
  }
};

// Inner states scale * down(x).
struct Inner {
  const uint32_t* x = nullptr;     // [N, K / 2], pairs
  const uint32_t* down = nullptr;  // [K / 2, R], pairs along the inputs; null = nothing is computed
  bf16* out = nullptr;             // [N, R]
  int64_t rows = 0, pairs = 0, width = 0;  // N, K / 2, R
  float scale = 1.0f;

  int64_t tasks() const { return (rows + kRows - 1) / kRows; }
  void run(int64_t begin, int64_t end) const;
};

// Checks that the parts fit each other and `outputs` columns; the inner states are [N, width].
Addition addition_of(const bf16* inner, int64_t width, const at::Tensor& up,
                     const at::Tensor& starts, int64_t outputs);

// Checks that `down` fits x [N, K].
Inner inner_of(const bf16* x, int64_t rows, int64_t inputs, const at::Tensor& down, double scale,
               bf16* out);

// scale * down(x), [N, R].
at::Tensor low_rank_inner(const at::Tensor& x, const at::Tensor& down, double scale);

// Adds up(inner) to out [N, O] in place.
void low_rank_add_(at::Tensor& out, const at::Tensor& inner, const at::Tensor& up,
                   const at::Tensor& starts);

}  // namespace rlprompt

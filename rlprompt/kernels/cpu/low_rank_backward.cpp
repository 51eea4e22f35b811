// Gradients of what an adapter of low rank adds (see low_rank.h), in two passes: rows first, for
// the inner states and the input; then columns, each of which sums over all rows in their order, so
// that no number depends on how many threads there are.

#include "low_rank.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace rlprompt {
namespace {

constexpr int64_t kColumns = 32;  // of a task of the second pass
constexpr int64_t kChunk = 256;   // rows that are arranged at once

// Outputs whose gradients reach the same vectors of inner states.
struct Run {
  int64_t first, end;      // outputs
  int64_t vector, behind;  // inner states, in numbers
};

std::vector<Run> runs_of(const int32_t* starts, int64_t outputs, int64_t rank) {
  std::vector<Run> runs;
  for (int64_t j = 0; j < outputs; j += kLanes) {
    const int64_t start = starts[j / kLanes];
    if (start < 0) continue;
    const int64_t vector = 2 * start / kLanes * kLanes, behind = padded(2 * start + rank);
    if (!runs.empty() && runs.back().end == j && runs.back().vector == vector &&
        runs.back().behind == behind)
      runs.back().end = j + kLanes;
    else
      runs.push_back({j, j + kLanes, vector, behind});
  }
  return runs;
}

// up [O, r] as pairs along outputs, [O / 2, R]; zero where an output does not take an inner state.
std::vector<uint32_t> output_pairs(const bf16* up, const int32_t* starts, int64_t outputs,
                                   int64_t rank, int64_t width) {
  std::vector<uint32_t> pairs(outputs / 2 * width);
  for (int64_t j = 0; j < outputs; j += 2) {
    const int64_t start = starts[j / kLanes];
    if (start < 0) continue;
    uint32_t* to = &pairs[j / 2 * width + 2 * start];
    for (int64_t i = 0; i < rank; ++i)
      to[i] = up[j * rank + i].bits | static_cast<uint32_t>(up[(j + 1) * rank + i].bits) << 16;
  }
  return pairs;
}

// Rows [n, width] as pairs of rows, [padded(n) / 2, width].
std::vector<uint32_t> row_pairs(const bf16* rows, int64_t count, int64_t width) {
  std::vector<uint32_t> pairs(padded(count) / 2 * width);
  write_row_pairs([&](int64_t i) { return rows + i * width; }, count, width, pairs.data());
  return pairs;
}

struct Backward {
  int64_t rows, inputs, outputs, rank, width;  // N, K, O, r, R
  const bf16 *grad, *x, *inner;
  const int32_t* starts;
  float scale;

  // The first pass, `count` rows: their inner states' gradients, and what these add to the input's.
  void run_rows(int64_t row, int64_t count, const std::vector<Run>& runs, const uint32_t* up,
                const uint32_t* down, int64_t used, bf16* d_inner, bf16* d_x, float* sums) const {
    std::fill_n(sums, count * width, 0.0f);
    const auto* pairs = reinterpret_cast<const uint32_t*>(grad + row * outputs);
    for (const Run& run : runs)
      narrow_product(count, run.behind - run.vector, (run.end - run.first) / 2,
                     pairs + run.first / 2, outputs / 2, 1,
                     {up + run.first / 2 * width + run.vector, width}, sums + run.vector, width,
                     Into::kContinue);
    bf16* states = d_inner + row * width;
    for (int64_t i = 0; i < count * width; i += kLanes) store(states + i, load(sums + i) * scale);
    if (d_x == nullptr) return;
    const auto* left = reinterpret_cast<const uint32_t*>(states);
    narrow_product(count, inputs, used / 2, left, width / 2, 1, {down, inputs}, sums, inputs,
                   Into::kFresh);
    bf16* to = d_x + row * inputs;
    for (int64_t i = 0; i < count * inputs; i += kLanes)
      store(to + i, load(to + i) + load(sums + i));
  }

  // The second pass, kColumns or fewer columns of `from` [N, n]: sums [count, columns] over rows of
  // `states` (pairs of rows, `count` inner states from `start` on) times these columns.
  void run_columns(const bf16* from, int64_t stride, int64_t column, int64_t columns,
                   const uint32_t* states, int64_t start, int64_t count, uint32_t* space,
                   float* sums) const {
    std::fill_n(sums, count * columns, 0.0f);
    for (int64_t first = 0; first < rows; first += kChunk) {
      const int64_t some = std::min(kChunk, rows - first);
      const auto row = [&](int64_t i) { return from + (first + i) * stride + column; };
      write_row_pairs(row, some, columns, space);
      narrow_product(count, columns, padded(some) / 2, states + first / 2 * width + start, 1, width,
                     {space, columns}, sums, columns, Into::kContinue);
    }
  }

  // Calls body(task, space, sums) for every block of columns of a matrix with n of them.
  template <typename F>
  void for_columns(int64_t n, int64_t most, const F& body) const {
    at::parallel_for(0, (n + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> space(kChunk / 2 * kColumns);
      std::vector<float> sums(most * kColumns);
      for (int64_t task = begin; task < end; ++task)
        body(task * kColumns, std::min(kColumns, n - task * kColumns), space.data(), sums.data());
    });
  }

  // d_down [R, K].
  void run_down(const uint32_t* d_inner, int64_t used, float* d_down) const {
    for_columns(inputs, used, [&](int64_t column, int64_t columns, uint32_t* space, float* sums) {
      run_columns(x, inputs, column, columns, d_inner, 0, used, space, sums);
      for (int64_t i = 0; i < used; ++i)
        std::copy_n(sums + i * columns, columns, d_down + i * inputs + column);
    });
  }

  // d_up [O, r].
  void run_up(const uint32_t* states, float* d_up) const {
    for_columns(outputs, rank, [&](int64_t column, int64_t columns, uint32_t* space, float* sums) {
      const int32_t* start = starts + column / kLanes;
      const int64_t step = columns > kLanes && start[0] == start[1] ? columns : kLanes;
      for (int64_t j = column; j < column + columns; j += step) {
        if (starts[j / kLanes] < 0) continue;
        run_columns(grad, outputs, j, step, states, 2 * starts[j / kLanes], rank, space, sums);
        for (int64_t i = 0; i < rank; ++i)
          for (int64_t k = 0; k < step; ++k) d_up[(j + k) * rank + i] = sums[i * step + k];
      }
    });
  }
};

}  // namespace

// Gradients of down [R, K] and up [O, r], float32. grad [N, O], x [N, K], inner [N, R] and both
// weights: dense bfloat16; down is zero behind the inner states of all layers. What reaches x is
// added to d_x [N, K], which is empty where nothing is asked for.
std::tuple<at::Tensor, at::Tensor> low_rank_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& inner, const at::Tensor& down,
    const at::Tensor& up, const at::Tensor& starts, double scale, at::Tensor& d_x) {
  for (const at::Tensor& t : {grad, x, inner, down, up, d_x})
    TORCH_CHECK(t.scalar_type() == at::kBFloat16 && t.is_contiguous(), "dense bfloat16");
  const Backward work{x.size(0),       x.size(1),      up.size(0),        up.size(1),
                      inner.size(1),   data<bf16>(grad), data<bf16>(x),   data<bf16>(inner),
                      data<int32_t>(starts), static_cast<float>(scale)};
  TORCH_CHECK(grad.size(0) == work.rows && inner.size(0) == work.rows &&
                  grad.size(1) == work.outputs && starts.numel() * kLanes == work.outputs &&
                  down.size(0) == work.width && down.size(1) == work.inputs &&
                  work.width % kLanes == 0 && work.inputs % kLanes == 0 && work.rank % 2 == 0 &&
                  (d_x.numel() == 0 || d_x.sizes() == x.sizes()),
              "parts of other shapes");
  const int64_t most = *std::max_element(work.starts, work.starts + starts.numel());
  TORCH_CHECK(most >= 0, "no layer has a part");
  const int64_t used = 2 * most + work.rank;  // the other inner states are always zero
  const auto wide = grad.options().dtype(at::kFloat);
  at::Tensor d_inner = at::empty({work.rows, work.width}, grad.options());
  at::Tensor d_down = at::zeros({work.width, work.inputs}, wide);
  at::Tensor d_up = at::zeros({work.outputs, work.rank}, wide);
  bf16* states = data_out<bf16>(d_inner);
  bf16* toward_x = d_x.numel() ? data_out<bf16>(d_x) : nullptr;
  const auto runs = runs_of(work.starts, work.outputs, work.rank);
  const auto of_up =
      output_pairs(data<bf16>(up), work.starts, work.outputs, work.rank, work.width);
  const auto of_down = row_pairs(data<bf16>(down), work.width, work.inputs);
  at::parallel_for(0, (work.rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(kRows * std::max(work.width, work.inputs));
    for (int64_t row = begin * kRows; row < std::min(end * kRows, work.rows); row += kRows)
      work.run_rows(row, std::min(kRows, work.rows - row), runs, of_up.data(), of_down.data(), used,
                    states, toward_x, sums.data());
  });
  work.run_down(row_pairs(states, work.rows, work.width).data(), used, data_out<float>(d_down));
  work.run_up(row_pairs(work.inner, work.rows, work.width).data(), data_out<float>(d_up));
  return {d_down, d_up};
}

TORCH_LIBRARY_FRAGMENT(rlprompt_cpu, m) {
  m.def(
      "low_rank_backward(Tensor grad, Tensor x, Tensor inner, Tensor down, Tensor up, "
      "Tensor starts, float scale, Tensor(a!) d_x) -> (Tensor, Tensor)",
      &low_rank_backward);
}

}  // namespace rlprompt

// What an adapter of low rank adds to a product: out += up(scale * down(x)), with the roundings of
// three operations on bfloat16 tensors. Sums have one order for any number of rows, so that decoding
// and training add the same bits.

#include "pairs.h"

#include <ATen/ops/empty.h>

namespace rlprompt {

at::Tensor low_rank_add_(at::Tensor& out, const at::Tensor& x, const at::Tensor& down,
                         const at::Tensor& up, double scale);

namespace {

constexpr int64_t kMostRows = 24;  // that a thread computes at once: all its numbers stay near
constexpr int64_t kColumns = 64;   // of the output at once

struct LowRank {
  const uint32_t *x, *down, *up;  // [N, K / 2]; [K / 2, R]; [R / 2, O]
  bf16 *inner, *out;              // [N, R]; [N, O]
  int64_t inputs, rank, outputs;
  float scale;

  // `count` rows from `first` on; `sums` has room for them.
  void run(int64_t first, int64_t count, float* sums) const {
    product(count, rank, inputs / 2, x + first * inputs / 2, inputs / 2, 1, {down, rank}, sums,
            rank, Into::kFresh);
    bf16* within = inner + first * rank;
    for (int64_t i = 0; i < count * rank; i += kLanes)
      store(within + i, rounded<bf16>(load(sums + i)) * scale);
    for (int64_t j = 0; j < outputs; j += kColumns)
      add(first, count, j, std::min(kColumns, outputs - j), sums);
  }

 private:
  void add(int64_t first, int64_t count, int64_t column, int64_t width, float* sums) const {
    const auto* pairs = reinterpret_cast<const uint32_t*>(inner + first * rank);
    product(count, width, rank / 2, pairs, rank / 2, 1, {up + column, outputs}, sums, width,
            Into::kFresh);
    for (int64_t i = 0; i < count; ++i) {
      bf16* to = out + (first + i) * outputs + column;
      for (int64_t j = 0; j < width; j += kLanes)
        store(to + j, load(to + j) + rounded<bf16>(load(sums + i * width + j)));
    }
  }
};

}  // namespace

// A weight [n, k] as the products read it: int32 [k / 2, n], pairs along its inputs. n is a multiple
// of kLanes, k is even.
at::Tensor input_pairs(const at::Tensor& weight) {
  const int64_t count = weight.size(0), dim = weight.size(1);
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.is_contiguous(), "dense bfloat16");
  TORCH_CHECK(count % kLanes == 0 && dim % 2 == 0, "a weight of another shape");
  at::Tensor out = at::empty({dim / 2, count}, weight.options().dtype(at::kInt));
  const bf16* from = data<bf16>(weight);
  write_columns([&](int64_t i) { return from + i * dim; }, count, dim,
                reinterpret_cast<uint32_t*>(data_out<int32_t>(out)), count);
  return out;
}

// Adds to out [N, O] in place; returns scale * down(x), [N, R]. x [N, K]; down [K / 2, R] and
// up [R / 2, O] from input_pairs.
at::Tensor low_rank_add_(at::Tensor& out, const at::Tensor& x, const at::Tensor& down,
                         const at::Tensor& up, double scale) {
  const int64_t rows = x.size(0), rank = down.size(1), outputs = out.size(1);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && out.scalar_type() == at::kBFloat16, "bfloat16");
  TORCH_CHECK(x.is_contiguous() && out.is_contiguous(), "rows want dense memory");
  TORCH_CHECK(2 * down.size(0) == x.size(1) && 2 * up.size(0) == rank && up.size(1) == outputs &&
                  out.size(0) == rows,
              "parts of other shapes");
  at::Tensor inner = at::empty({rows, rank}, x.options());
  const auto pairs = [](const at::Tensor& t) {
    return static_cast<const uint32_t*>(t.const_data_ptr());
  };
  const LowRank work{pairs(x), pairs(down), pairs(up), data_out<bf16>(inner), data_out<bf16>(out),
                     x.size(1), rank, outputs, static_cast<float>(scale)};
  const int64_t threads = at::get_num_threads();
  const int64_t block = std::clamp<int64_t>((rows + threads - 1) / threads, 1, kMostRows);
  at::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(block * std::max(rank, kColumns));
    for (int64_t i = begin; i < end; ++i)
      work.run(i * block, std::min(block, rows - i * block), sums.data());
  });
  return inner;
}

TORCH_LIBRARY_FRAGMENT(rlprompt_cpu, m) {
  m.def("input_pairs(Tensor weight) -> Tensor", &input_pairs);
  m.def("low_rank_add_(Tensor(a!) out, Tensor x, Tensor down, Tensor up, float scale) -> Tensor",
        &low_rank_add_);
}

}  // namespace rlprompt

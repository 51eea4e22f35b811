// Inner states of an adapter of low rank, and what comes of them at the outputs (see low_rank.h).

#include "low_rank.h"

#include <ATen/ops/empty.h>

namespace rlprompt {
// A weight [n, k] as the products read it: int32 [k / 2, n], pairs along its inputs. n is a
// multiple of kLanes, k is even.
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

Addition addition_of(const bf16* inner, int64_t width, const at::Tensor& up,
                     const at::Tensor& starts, int64_t outputs) {
  TORCH_CHECK(up.size(1) == outputs && starts.numel() * kLanes == outputs &&
                  2 * up.size(0) <= width && starts.scalar_type() == at::kInt,
              "parts of other shapes");
  return {reinterpret_cast<const uint32_t*>(inner),
          static_cast<const uint32_t*>(up.const_data_ptr()),
          data<int32_t>(starts),
          width / 2,
          up.size(0),
          outputs};
}

Inner inner_of(const bf16* x, int64_t rows, int64_t inputs, const at::Tensor& down, double scale,
               bf16* out) {
  TORCH_CHECK(2 * down.size(0) == inputs && down.size(1) % kLanes == 0, "parts of other shapes");
  return {reinterpret_cast<const uint32_t*>(x),
          static_cast<const uint32_t*>(down.const_data_ptr()),
          out,
          rows,
          down.size(0),
          down.size(1),
          static_cast<float>(scale)};
}

void Inner::run(int64_t begin, int64_t end) const {
  std::vector<float> sums(kRows * width);
  for (int64_t row = begin * kRows; row < std::min(end * kRows, rows); row += kRows) {
    const int64_t count = std::min(kRows, rows - row);
    narrow_product(count, width, pairs, x + row * pairs, pairs, 1, {down, width}, sums.data(),
                   width, Into::kFresh);
    for (int64_t i = 0; i < count * width; i += kLanes)
      store(out + row * width + i, rounded<bf16>(load(&sums[i])) * scale);
  }
}

// x [N, K]; down [K / 2, R] from input_pairs.
at::Tensor low_rank_inner(const at::Tensor& x, const at::Tensor& down, double scale) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.is_contiguous(), "rows want dense memory");
  at::Tensor out = at::empty({x.size(0), down.size(1)}, x.options());
  const Inner inner =
      inner_of(data<bf16>(x), x.size(0), x.size(1), down, scale, data_out<bf16>(out));
  at::parallel_for(0, inner.tasks(), 1,
                   [&](int64_t begin, int64_t end) { inner.run(begin, end); });
  return out;
}

// inner [N, R] from low_rank_inner; up [r / 2, O] from input_pairs; starts int32 [O / kLanes].
void low_rank_add_(at::Tensor& out, const at::Tensor& inner, const at::Tensor& up,
                   const at::Tensor& starts) {
  const int64_t rows = out.size(0), outputs = out.size(1);
  TORCH_CHECK(out.scalar_type() == at::kBFloat16 && out.is_contiguous() &&
                  inner.is_contiguous() && inner.size(0) == rows,
              "rows want dense memory");
  const Addition addition =
      addition_of(data<bf16>(inner), inner.size(1), up, starts, outputs);
  bf16* to = data_out<bf16>(out);
  at::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    const auto add = [&](auto count, int64_t row) {
      for (int64_t j = 0; j < outputs; j += 2 * kLanes)
        addition.add<decltype(count)::value>(row, j, std::min<int64_t>(2 * kLanes, outputs - j),
                                             to + row * outputs + j, outputs);
    };
    in_runs<8>(std::min(end * kRows, rows), add, begin * kRows);
  });
}

TORCH_LIBRARY_FRAGMENT(rlprompt_cpu, m) {
  m.def("input_pairs(Tensor weight) -> Tensor", &input_pairs);
  m.def("low_rank_inner(Tensor x, Tensor down, float scale) -> Tensor", &low_rank_inner);
  m.def("low_rank_add_(Tensor(a!) out, Tensor inner, Tensor up, Tensor starts) -> ()",
        &low_rank_add_);
}

}  // namespace rlprompt

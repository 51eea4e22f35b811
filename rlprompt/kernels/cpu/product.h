// The product of a few rows with a frozen weight, as other kernels call it (see product.cpp).
#pragma once

#include "low_rank.h"

namespace rlprompt {

// Memory that is read right after a product, and asked for meanwhile.
struct Soon {
  const char* bytes = nullptr;
  int64_t count = 0;

  // The part of it that comes with the `i`th of `n` steps.
  void prefetch(int64_t i, int64_t n) const {
    constexpr int64_t kLine = 64;
    const int64_t lines = (count + kLine - 1) / kLine, some = (lines + n - 1) / n;
    for (int64_t line = i * some; line < std::min((i + 1) * some, lines); ++line)
      __builtin_prefetch(bytes + line * kLine, 0, 2);
  }
};

// out [B, N] = x [B, K] W^T + bias, and what an adapter adds.
struct PackedProduct {
  const bf16 *x, *weights, *bias;  // bias null = none
  bf16* out;
  int64_t rows, inputs, outputs, chunk;
  Addition addition = {};  // without inner states = nothing
  Soon soon = {};

  int64_t units() const;  // blocks of outputs, which any threads may compute
  void run(int64_t begin, int64_t end) const;
};

// Checks all but the memory of `x` and `out`. K is a multiple of 32 and N of 64; the caller has
// made sure that the weight is packed as product.cpp says.
PackedProduct packed_product_of(const bf16* x, int64_t rows, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, int64_t chunk, bf16* out);

}  // namespace rlprompt

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

// Writes x W^T + b to out [B, N], and adds what an adapter adds to it; null = nothing.
void packed_product_into(at::Tensor& out, const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, int64_t chunk,
                         const Addition* addition, const Soon& soon);

}  // namespace rlprompt

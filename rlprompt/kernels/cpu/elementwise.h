// Parts of a layer that work row by row, as a decode step calls them (see elementwise.cpp).
#pragma once

#include "common.h"

namespace rlprompt {

// Rows [begin, end) of x [N, d]: out = weight * x / rms(x).
void norm_rows(const bf16* x, const bf16* weight, bf16* out, int64_t width, float eps,
               int64_t begin, int64_t end);

// The same after residual += update.
void add_norm_rows(bf16* residual, const bf16* update, const bf16* weight, bf16* out,
                   int64_t width, float eps, int64_t begin, int64_t end);

// Rows [begin, end) of x = [gate | up], [N, 2 width]: out = silu(gate) * up.
void gate_rows(const bf16* x, bf16* out, int64_t width, int64_t begin, int64_t end);

}  // namespace rlprompt

// Attention of one new token per row over a cache laid out for it (see cache_layout.py).
#pragma once

#include "pairs.h"

namespace rlprompt {

// Where the columns of a cache stand. A row's columns are its tokens, [prefix | query |
// completion]; those of rows with a shorter query stand `padding` places earlier. Whole blocks of
// columns that a row shares with its leader are read there: they stay in the processor's cache when
// all rows of a group read one copy.
struct Columns {
  int64_t column, shared;  // of a row without padding: the one to write; how many are shared
  int64_t capacity;
  const int64_t *padding, *leaders;
};

// table: int64 [2, at least B], padding and leaders. place: shared columns, and the one to write.
Columns columns_of(const at::Tensor& cache, const at::Tensor& table, at::IntArrayRef place);

// Queries [B, H, D], keys and values [B, H_kv, D] of the new tokens, and the output [B, H, D].
struct Heads {
  Packed<bf16> query, key, value, out;
  int64_t rows, heads, kv_heads, dim;
};

// Writes the new column of every row in one layer, and attends.
struct Attention {
  Heads of;
  const bf16 *cos, *sin;   // [B, D]; null = queries and keys are turned already
  Columns at;
  uint32_t *keys, *values;  // of the layer
  float scaling;

  int64_t tasks() const { return of.rows * of.kv_heads; }
  void run(int64_t begin, int64_t end) const;
};

// cache [2 L, rows >= B, H_kv, capacity, D], laid out so, keys of all layers first.
Attention attention_of(const Heads& of, const bf16* cos, const bf16* sin, const Columns& at,
                       at::Tensor& cache, int64_t layer, double scaling);

}  // namespace rlprompt

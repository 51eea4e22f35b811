// What attention is made of: products of bfloat16 numbers that are summed in float32, and softmax.
//
// A product sums its inner dimension two numbers at a time, so operands hold pairs: two neighbours
// along that dimension in 32 bits, the first one low. Decoding and training call the same functions
// on the same numbers in the same order: that is why their bits are equal.
#pragma once

#include "common.h"

namespace rlprompt {

using Pairs = std::vector<uint32_t>;

inline int_vec load(const uint32_t* p) {
  int_vec out;
  std::memcpy(&out, p, sizeof(int_vec));
  return out;
}
inline void store(uint32_t* p, int_vec v) { std::memcpy(p, &v, sizeof(int_vec)); }

// sum + a[0] b[0] + a[1] b[1] in each lane.
inline vec dot(vec sum, int_vec a, int_vec b) {
#ifdef RLPROMPT_BF16_PRODUCTS
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  const auto first = [](int_vec x) { return reinterpret_cast<vec>(x << 16); };
  const auto second = [](int_vec x) { return reinterpret_cast<vec>(x & 0xffff0000u); };
  return sum + second(a) * second(b) + first(a) * first(b);
#endif
}

// What a product does with the numbers that stand where it writes.
enum class Into {
  kFresh,     // overwrites them
  kAdd,       // adds its sums to them
  kContinue,  // its sums go on from them, as if what came before were part of one product
};

// Pairs [k, n]: vectors of kLanes columns, with strides between rows and between vectors.
struct Right {
  const uint32_t* pairs;
  int64_t row, vector = kLanes;
  Right from(int64_t column) const { return {pairs + column / kLanes * vector, row, vector}; }
};

// MR rows times NV vectors of C (+)= A B over `k` pairs; A is read one pair at a time by strides.
template <int MR, int NV>
inline void tile(int64_t k, const uint32_t* a, int64_t row_a, int64_t col_a, const Right& b,
                 float* c, int64_t ldc, Into into) {
  vec acc[MR][NV] = {};
  if (into == Into::kContinue)
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) acc[i][j] = load(c + i * ldc + j * kLanes);
  for (int64_t p = 0; p < k; ++p) {
    int_vec row[NV];
    for (int j = 0; j < NV; ++j) row[j] = load(b.pairs + p * b.row + j * b.vector);
    for (int i = 0; i < MR; ++i) {
      const int_vec x = int_vec{} + a[i * row_a + p * col_a];
      for (int j = 0; j < NV; ++j) acc[i][j] = dot(acc[i][j], x, row[j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) {
      float* to = c + i * ldc + j * kLanes;
      store(to, into == Into::kAdd ? load(to) + acc[i][j] : acc[i][j]);
    }
}

// All rows of NV vectors, MR at a time: as many sums at once as registers hold.
template <int NV>
inline void columns(int64_t m, int64_t k, const uint32_t* a, int64_t row_a, int64_t col_a,
                    const Right& b, float* c, int64_t ldc, Into into) {
  constexpr int kRows = NV == 4 ? 6 : 12;
  int64_t i = 0;
  const auto rows = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    for (; i + kCount <= m; i += kCount)
      tile<kCount, NV>(k, a + i * row_a, row_a, col_a, b, c + i * ldc, ldc, into);
  };
  rows(std::integral_constant<int, kRows>{});
  rows(std::integral_constant<int, 3>{});
  rows(std::integral_constant<int, 1>{});
}

// C [m, n] (+)= A [m, 2 k] B [2 k, n]. A holds pairs with a stride between rows and between pairs;
// n is a multiple of kLanes. Each number is a sum in the order of the pairs, whatever m and n are.
inline void product(int64_t m, int64_t n, int64_t k, const uint32_t* a, int64_t row_a,
                    int64_t col_a, const Right& b, float* c, int64_t ldc, Into into) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes)
    columns<4>(m, k, a, row_a, col_a, b.from(j), c + j, ldc, into);
  for (; j + 2 * kLanes <= n; j += 2 * kLanes)
    columns<2>(m, k, a, row_a, col_a, b.from(j), c + j, ldc, into);
  for (; j < n; j += kLanes) columns<1>(m, k, a, row_a, col_a, b.from(j), c + j, ldc, into);
}

// Two rows of n bfloat16 numbers become n pairs; null stands for a row of zeros.
inline void interleave(const bf16* first, const bf16* second, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int_vec low = first == nullptr ? int_vec{} : widened_bits(first + i);
    const int_vec high = second == nullptr ? int_vec{} : widened_bits(second + i);
    store(out + i, low | (high << 16));
  }
}

// One step of a transposition: swaps the places whose row and column differ in bit H.
template <int H>
inline void swap_bit(int_vec* rows) {
  int_vec low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = (i & H) ? kLanes + i - H : i;
    high[i] = (i & H) ? kLanes + i : i + H;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & H) continue;
    const int_vec a = rows[i], b = rows[i + H];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + H] = __builtin_shuffle(a, b, high);
  }
}

inline void transpose(int_vec* rows) {
  swap_bit<8>(rows);
  swap_bit<4>(rows);
  swap_bit<2>(rows);
  swap_bit<1>(rows);
}

// `count` rows of `dim` numbers, row(i) each, become columns of out [dim / 2, width]: pairs along
// their dims. Columns up to the next multiple of kLanes are zero.
template <typename F>
inline void write_columns(const F& row, int64_t count, int64_t dim, uint32_t* out, int64_t width) {
  const int64_t pairs = dim / 2;
  for (int64_t s = 0; s < count; s += kLanes)
    for (int64_t p = 0; p < pairs; p += kLanes) {
      const int64_t some = std::min<int64_t>(kLanes, pairs - p);
      int_vec square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = int_vec{};
        if (s + i >= count) continue;
        const bf16* from = row(s + i) + 2 * p;
        // A size known in advance is one instruction, any other one a call.
        if (some == kLanes)
          std::memcpy(&square[i], from, sizeof(int_vec));
        else
          std::memcpy(&square[i], from, 4 * some);
      }
      transpose(square);
      for (int64_t i = 0; i < some; ++i) store(out + (p + i) * width + s, square[i]);
    }
}

// `count` rows of `dim` numbers, row(i) each, become out [padded(count) / 2, dim]: pairs of rows.
// Rows behind them are zero.
template <typename F>
inline void write_row_pairs(const F& row, int64_t count, int64_t dim, uint32_t* out) {
  for (int64_t s = 0; s < padded(count); s += 2, out += dim)
    interleave(s < count ? row(s) : nullptr, s + 1 < count ? row(s + 1) : nullptr, dim, out);
}

// One row of `dim` numbers becomes column j of keys in the order of cache_layout.py: blocks of kLanes
// columns, in each block pairs along dims, [D / 2, kLanes].
inline void put_key(const bf16* row, int64_t j, int64_t dim, uint32_t* keys) {
  uint32_t* to = keys + j / kLanes * (dim / 2) * kLanes + j % kLanes;
  for (int64_t p = 0; p < dim / 2; ++p) std::memcpy(to + p * kLanes, row + 2 * p, 4);
}

// One row of `dim` numbers becomes column j of values in that order: pairs of columns,
// [D]. The columns behind it are zero up to the next multiple of kLanes, if columns come in their
// order.
inline void put_value(const bf16* row, int64_t j, int64_t dim, uint32_t* values) {
  if (j % kLanes == 0) std::fill_n(values + j / 2 * dim, kLanes / 2 * dim, 0u);
  uint32_t* to = values + j / 2 * dim;
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int_vec bits = widened_bits(row + d);
    store(to + d, j % 2 ? (load(to + d) & 0xffffu) | (bits << 16) : bits);
  }
}

// Softmax over the first `count` of `wide` scores, with the plain path's roundings; zeros behind.
// The scores are overwritten. How many zeros there are does not change the other numbers.
__attribute__((noinline)) inline void softmax(float* scores, bf16* out, int64_t count,
                                              int64_t wide) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  signed_vec left;  // scores that count from this lane on
  for (int i = 0; i < kLanes; ++i) left[i] = static_cast<int32_t>(count) - i;
  vec top = vec{} + kNever, mass = {};
  for (int64_t s = 0; s < wide; s += kLanes, left -= kLanes) {
    const vec score = left > 0 ? rounded<bf16>(load(scores + s)) : vec{} + kNever;
    store(scores + s, score);
    top = larger(top, score);
  }
  const float highest = most_across(top);
  for (int64_t s = 0; s < wide; s += kLanes) {
    const vec weight = exponential(load(scores + s) - highest);
    store(scores + s, weight);
    mass += weight;
  }
  const float share = 1.0f / sum_across(mass);
  for (int64_t s = 0; s < wide; s += kLanes) store(out + s, load(scores + s) * share);
}

}  // namespace rlprompt

// What all CPU kernels share: number formats with the roundings of torch, an exponential that
// compilers vectorise, and small matrix products in float32.
//
// Vectors are GCC's generic ones, so the same source serves AVX-512, AVX2 and NEON.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace rlprompt {

constexpr int kLanes = 16;
typedef float vec __attribute__((vector_size(4 * kLanes), aligned(4)));

struct bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? 0x7fc0 : static_cast<uint16_t>(nearest_even);
}

template <typename T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  return bf16{bf16_bits(x)};
}

// A float32 value rounded as a tensor of type T would hold it.
template <typename T>
inline float rounded(float x) {
  return widen(narrow<T>(x));
}

// exp(x) within 1e-7 of it, relatively (Cephes' polynomial); 0 below -87.3, inf above 88.7.
inline float exponential(float x) {
  float clamped = x < -88.0f ? -88.0f : x;
  clamped = clamped > 89.0f ? 89.0f : clamped;
  const float whole = std::floor(clamped * 1.44269504088896341f + 0.5f);
  float r = clamped - whole * 0.693359375f;
  r -= whole * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Two factors, so that 2^128 (whose exponent does not fit) is infinite and not NaN.
  const int32_t n = static_cast<int32_t>(whole);
  const int32_t half = n >> 1;
  const uint32_t first = static_cast<uint32_t>(half + 127) << 23;
  const uint32_t second = static_cast<uint32_t>(n - half + 127) << 23;
  float a, b;
  std::memcpy(&a, &first, 4);
  std::memcpy(&b, &second, 4);
  const float value = p * a * b;
  return x < -87.3f ? 0.0f : value;
}

template <typename T>
inline const T* data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
inline T* data_out(at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// A packed tensor [N, heads, D] with any strides but dense dims.
template <typename T>
struct Packed {
  explicit Packed(const at::Tensor& t)
      : base(static_cast<T*>(const_cast<void*>(t.const_data_ptr()))),
        token(t.stride(0)),
        head(t.stride(1)) {}
  T* at(int64_t n, int64_t h) const { return base + n * token + h * head; }
  T* base;
  int64_t token, head;
};

// Calls `body` with a bf16 or a float, as the tensor's type asks.
template <typename F>
inline void by_type(const at::Tensor& t, const F& body) {
  if (t.scalar_type() == at::kBFloat16) {
    body(bf16{});
  } else {
    TORCH_CHECK(t.scalar_type() == at::kFloat, "CPU kernels take bfloat16 and float32");
    body(float{});
  }
}

typedef uint16_t half_vec __attribute__((vector_size(2 * kLanes), aligned(2)));
typedef uint32_t int_vec __attribute__((vector_size(4 * kLanes), aligned(4)));

inline vec load(const bf16* p) {
  half_vec bits;
  std::memcpy(&bits, p, sizeof(half_vec));
  return reinterpret_cast<vec>(__builtin_convertvector(bits, int_vec) << 16);
}
inline vec load(const float* p) {
  vec out;
  std::memcpy(&out, p, sizeof(vec));
  return out;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof(vec)); }

// MR rows times NV vectors of C (+)= A B; A is read one number at a time by strides.
template <int MR, int NV, typename B>
inline void tile(int64_t k, const float* a, int64_t row_a, int64_t col_a, const B* b,
                 int64_t ldb, float* c, int64_t ldc, bool add) {
  vec acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = add ? load(c + i * ldc + j * kLanes) : vec{};
  for (int64_t p = 0; p < k; ++p) {
    vec row[NV];
    for (int j = 0; j < NV; ++j) row[j] = load(b + p * ldb + j * kLanes);
    for (int i = 0; i < MR; ++i) {
      const float x = a[i * row_a + p * col_a];
      for (int j = 0; j < NV; ++j) acc[i][j] += x * row[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) store(c + i * ldc + j * kLanes, acc[i][j]);
}

template <int NV, typename B>
inline void columns(int64_t m, int64_t k, const float* a, int64_t row_a, int64_t col_a,
                    const B* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t i = 0;
  for (; i + 6 <= m; i += 6)
    tile<6, NV>(k, a + i * row_a, row_a, col_a, b, ldb, c + i * ldc, ldc, add);
  for (; i + 2 <= m; i += 2)
    tile<2, NV>(k, a + i * row_a, row_a, col_a, b, ldb, c + i * ldc, ldc, add);
  for (; i < m; ++i) tile<1, NV>(k, a + i * row_a, row_a, col_a, b, ldb, c + i * ldc, ldc, add);
}

// C [m, n] (+)= A [m, k] B [k, n] in float32, each number a sum in the order of k; n is a multiple
// of kLanes.
template <typename B>
inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t row_a, int64_t col_a,
                    const B* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes)
    columns<4>(m, k, a, row_a, col_a, b + j, ldb, c + j, ldc, add);
  for (; j + 2 * kLanes <= n; j += 2 * kLanes)
    columns<2>(m, k, a, row_a, col_a, b + j, ldb, c + j, ldc, add);
  for (; j < n; j += kLanes) columns<1>(m, k, a, row_a, col_a, b + j, ldb, c + j, ldc, add);
}

// One step of a transposition: swaps the places whose row and column differ in bit H.
template <int H>
inline void swap_bit(vec* rows) {
  int_vec low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = (i & H) ? kLanes + i - H : i;
    high[i] = (i & H) ? kLanes + i : i + H;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & H) continue;
    const vec a = rows[i], b = rows[i + H];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + H] = __builtin_shuffle(a, b, high);
  }
}

inline void transpose(vec* rows) {
  swap_bit<8>(rows);
  swap_bit<4>(rows);
  swap_bit<2>(rows);
  swap_bit<1>(rows);
}

// Up to kLanes rows of `dim` numbers, row(i) each, become columns of out [dim, width].
template <typename T, typename F>
inline void write_columns(const F& row, int64_t count, int64_t dim, float* out, int64_t width) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    vec square[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) square[i] = i < count ? load(row(i) + d) : vec{};
    transpose(square);
    for (int64_t i = 0; i < kLanes; ++i) store(out + (d + i) * width, square[i]);
  }
}

// Softmax over the first `count` of `wide` scores, with the plain path's roundings; zeros behind.
// Not inlined, so that decoding and training get the same bits.
template <typename T>
__attribute__((noinline)) void softmax(float* row, int64_t count, int64_t wide) {
  float top = -std::numeric_limits<float>::infinity(), mass = 0.0f;
#pragma omp simd reduction(max : top)
  for (int64_t s = 0; s < count; ++s) {
    row[s] = rounded<T>(row[s]);
    top = std::max(top, row[s]);
  }
#pragma omp simd reduction(+ : mass)
  for (int64_t s = 0; s < count; ++s) {
    row[s] = exponential(row[s] - top);
    mass += row[s];
  }
#pragma omp simd
  for (int64_t s = 0; s < count; ++s) row[s] = rounded<T>(row[s] / mass);
  std::fill(row + count, row + wide, 0.0f);
}

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// One head's dims [D]: out = x * cos + rotate_half(x) * sin; transposed where `back`.
template <typename T>
inline void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t dim, bool back) {
  const int64_t half = dim / 2;
  const float sign = back ? -1.0f : 1.0f;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float low = widen(x[i]), high = widen(x[i + half]);
    // Forward: the partner's value times the own place's sine; backward: both from the partner.
    const float sin_low = widen(sin[back ? i + half : i]), sin_high = widen(sin[back ? i : i + half]);
    const float turned_low = rounded<T>(-sign * high * sin_low);
    const float turned_high = rounded<T>(sign * low * sin_high);
    out[i] = narrow<T>(rounded<T>(low * widen(cos[i])) + turned_low);
    out[i + half] = narrow<T>(rounded<T>(high * widen(cos[i + half])) + turned_high);
  }
}


}  // namespace rlprompt

// What all CPU kernels share: number formats with the roundings of torch, vectors of 16 numbers, an
// exponential, and the rotary embedding.
//
// Vectors are GCC's generic ones, so the same source serves AVX-512, AVX2 and NEON; where one
// instruction of AVX-512 does the work of many, it is named.
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

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define RLPROMPT_BF16_PRODUCTS 1
#include <immintrin.h>
#endif

namespace rlprompt {

constexpr int kLanes = 16;
typedef float vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t int_vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t signed_vec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t half_vec __attribute__((vector_size(2 * kLanes)));

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

template <typename T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bf16{x != x ? uint16_t{0x7fc0} : static_cast<uint16_t>(nearest_even)};
}

// 16 numbers rounded to the nearest bfloat16, ties to even, in the low halves.
inline half_vec narrow(vec x) {
#ifdef RLPROMPT_BF16_PRODUCTS
  return (half_vec)_mm512_cvtneps_pbh((__m512)x);
#else
  const int_vec bits = reinterpret_cast<int_vec>(x);
  const int_vec nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x != x ? int_vec{} + 0x7fc0u : nearest_even, half_vec);
#endif
}

inline int_vec widened_bits(const bf16* p) {
  half_vec bits;
  std::memcpy(&bits, p, sizeof(half_vec));
  return __builtin_convertvector(bits, int_vec);
}

inline vec load(const bf16* p) { return reinterpret_cast<vec>(widened_bits(p) << 16); }
inline vec load(const float* p) {
  vec out;
  std::memcpy(&out, p, sizeof(vec));
  return out;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof(vec)); }
inline void store(bf16* p, vec v) {
  const half_vec bits = narrow(v);
  std::memcpy(p, &bits, sizeof(half_vec));
}

// Numbers rounded as a tensor of type T would hold them.
template <typename T>
inline vec rounded(vec x) {
  if constexpr (std::is_same_v<T, float>) return x;
  return reinterpret_cast<vec>(__builtin_convertvector(narrow(x), int_vec) << 16);
}

// How many lanes of a vector count: all of them, or the first few at the end of a row.
struct Whole {};
struct Part {
  int64_t lanes;
};

template <typename T>
inline vec load(const T* p, Whole) {
  return load(p);
}
template <typename T>
inline vec load(const T* p, Part part) {
  T space[kLanes] = {};
  std::memcpy(space, p, part.lanes * sizeof(T));
  return load(space);
}
template <typename T>
inline void store(T* p, vec v, Whole) {
  store(p, v);
}
template <typename T>
inline void store(T* p, vec v, Part part) {
  T space[kLanes];
  store(space, v);
  std::memcpy(p, space, part.lanes * sizeof(T));
}

// Zeros in the lanes that do not count.
inline vec only(vec v, Whole) { return v; }
inline vec only(vec v, Part part) {
  for (int64_t i = part.lanes; i < kLanes; ++i) v[i] = 0.0f;
  return v;
}

// Calls body(place, lanes) for every vector of a row; loads behind the row's end give zeros.
template <typename F>
inline void sweep(int64_t width, const F& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, Whole{});
  if (i < width) body(i, Part{width - i});
}

// Each lane's partner: the one whose number differs in bit H. (Written out, for the compiler to see
// that it is one instruction.)
template <uint32_t H>
inline vec partners(vec v) {
  return __builtin_shuffle(
      v, int_vec{0 ^ H, 1 ^ H, 2 ^ H, 3 ^ H, 4 ^ H, 5 ^ H, 6 ^ H, 7 ^ H, 8 ^ H, 9 ^ H, 10 ^ H,
                 11 ^ H, 12 ^ H, 13 ^ H, 14 ^ H, 15 ^ H});
}

// The lanes of a vector joined in pairs, then pairs of pairs.
template <typename F>
inline float across(vec v, const F& join) {
  v = join(v, partners<8>(v));
  v = join(v, partners<4>(v));
  v = join(v, partners<2>(v));
  return join(v, partners<1>(v))[0];
}
inline float sum_across(vec v) {
  return across(v, [](vec a, vec b) { return a + b; });
}
inline vec larger(vec a, vec b) { return b > a ? b : a; }
inline float most_across(vec v) { return across(v, larger); }

// exp(x) within 1e-7 of it, relatively (Cephes' polynomial); 0 below -87.3, inf above 88.7.
inline vec exponential(vec x) {
  vec clamped = x < -88.0f ? vec{} - 88.0f : x;
  clamped = clamped > 89.0f ? vec{} + 89.0f : clamped;
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
  constexpr float kShift = 12582912.0f;
  const vec shifted = clamped * 1.44269504088896341f + kShift;
  const vec whole = shifted - kShift;
  vec r = clamped - whole * 0.693359375f;
  r -= whole * -2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#ifdef RLPROMPT_BF16_PRODUCTS
  const vec value = (vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  // Two factors, so that 2^128 (whose exponent does not fit) is infinite and not NaN.
  const signed_vec n = reinterpret_cast<signed_vec>(shifted) - 0x4b400000;
  const signed_vec half = n >> 1;
  const vec value = p * reinterpret_cast<vec>((half + 127) << 23) *
                    reinterpret_cast<vec>((n - half + 127) << 23);
#endif
  return x < -87.3f ? vec{} : value;
}
inline float exponential(float x) { return exponential(vec{} + x)[0]; }

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

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// One head's dims [D]: out = x * cos + rotate_half(x) * sin; transposed where `back`.
template <typename T>
inline void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t dim, bool back) {
  const int64_t half = dim / 2;
  const float sign = back ? -1.0f : 1.0f;
  sweep(half, [&](int64_t i, auto lanes) {
    const vec low = load(x + i, lanes), high = load(x + half + i, lanes);
    // Forward: the partner's value times the own place's sine; backward: both from the partner.
    const vec sin_low = load(sin + (back ? half : 0) + i, lanes);
    const vec sin_high = load(sin + (back ? 0 : half) + i, lanes);
    const vec turned_low = rounded<T>(high * sin_low * -sign);
    const vec turned_high = rounded<T>(low * sin_high * sign);
    store(out + i, rounded<T>(low * load(cos + i, lanes)) + turned_low, lanes);
    store(out + half + i, rounded<T>(high * load(cos + half + i, lanes)) + turned_high, lanes);
  });
}

}  // namespace rlprompt

// One decode step of a Llama-shaped base in a single call.
//
// A step of a small model for a few dozen rows is hundreds of tiny operations; starting each from
// Python costs more than computing it. The matrix products are torch's own (packed oneDNN ones
// where the weights are packed); everything between them is here, with the plain path's roundings.

#include "common.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <limits>

namespace rlprompt {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
at::Tensor add_rms_norm_(at::Tensor& residual, const at::Tensor& update, const at::Tensor& weight,
                         double eps);
at::Tensor silu_mul(const at::Tensor& x);

namespace {

using Weights = c10::List<std::optional<at::Tensor>>;

at::Tensor project(const at::Tensor& x, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias) {
  if (!weight.is_mkldnn()) return at::linear(x, weight, bias);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "");
  torch::jit::Stack stack;
  stack.reserve(6);
  stack.emplace_back(x);
  stack.emplace_back(weight);
  stack.emplace_back(bias);
  stack.emplace_back("none");
  stack.emplace_back(c10::List<std::optional<at::Scalar>>());
  stack.emplace_back("");
  op.callBoxed(stack);
  return stack[0].toTensor();
}

// Where the columns of a cache stand: [prefix | padding of each row | seen up to `column`].
struct Columns {
  int64_t prefix, column, capacity;
  const int64_t* padding;
};

// What one step does between the products of a layer.
template <typename T>
struct Step {
  Packed<T> query, key, value, out;
  const T *cos, *sin;  // [B, D]; null = queries and keys are turned already
  Columns at;
  int64_t share, dim;
  float scaling;

  // Scores of `seen` keys for all queries of one key/value head, then their outputs.
  void run(int64_t row, int64_t head, T* keys, T* values, std::vector<float>& space) const {
    const int64_t first = at.prefix + at.padding[row], seen = at.prefix + at.column + 1 - first;
    const int64_t wide = padded(seen);
    space.resize(share * (wide + 2 * dim));
    float *scores = space.data(), *q = scores + share * wide, *sums = q + share * dim;
    write_column(row, head, keys, values);
    T turned[kMostDims];
    for (int64_t h = 0; h < share; ++h) {
      const T* from = turn(query.at(row, head * share + h), row, turned);
      for (int64_t d = 0; d < dim; ++d) q[h * dim + d] = rounded<T>(widen(from[d]) * scaling);
    }
    for (int64_t j = 0; j < seen; ++j) {
      const T* k = keys + (j < at.prefix ? j : j - at.prefix + first) * dim;
      for (int64_t h = 0; h < share; ++h) {
        vec dots{};
        for (int64_t d = 0; d < dim; d += kLanes) dots += load(q + h * dim + d) * load(k + d);
        scores[h * wide + j] = rounded<T>(total(dots));
      }
    }
    for (int64_t h = 0; h < share; ++h) softmax(scores + h * wide, seen);
    std::fill(sums, sums + share * dim, 0.0f);
    for (int64_t j = 0; j < seen; ++j) {
      const T* v = values + (j < at.prefix ? j : j - at.prefix + first) * dim;
      for (int64_t h = 0; h < share; ++h) {
        const float weight = scores[h * wide + j];
        float* sum = sums + h * dim;
        for (int64_t d = 0; d < dim; d += kLanes)
          store(sum + d, load(sum + d) + weight * load(v + d));
      }
    }
    for (int64_t h = 0; h < share; ++h) {
      T* to = out.at(row, head * share + h);
      for (int64_t d = 0; d < dim; ++d) to[d] = narrow<T>(sums[h * dim + d]);
    }
  }

  static constexpr int64_t kMostDims = 512;

 private:
  const T* turn(const T* from, int64_t row, T* turned) const {
    if (cos == nullptr) return from;
    rotate(from, cos + row * dim, sin + row * dim, turned, dim, false);
    return turned;
  }

  void write_column(int64_t row, int64_t head, T* keys, T* values) const {
    T turned[kMostDims];
    std::memcpy(keys + at.column * dim, turn(key.at(row, head), row, turned), dim * sizeof(T));
    std::memcpy(values + at.column * dim, value.at(row, head), dim * sizeof(T));
  }

  static void softmax(float* row, int64_t count) {
    float top = -std::numeric_limits<float>::infinity(), mass = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < count; ++j) top = std::max(top, row[j]);
#pragma omp simd reduction(+ : mass)
    for (int64_t j = 0; j < count; ++j) {
      row[j] = exponential(row[j] - top);
      mass += row[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) row[j] = rounded<T>(row[j] / mass);
  }
};

// Writes the new column of one layer and attends: [B, H, D]. Queries [B, H, D], key and value
// [B, H_kv, D]; cos and sin [B, D], or empty where queries and keys are turned already.
at::Tensor attend_layer(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const at::Tensor& cos, const at::Tensor& sin, at::Tensor& cache,
                        int64_t layer, double scaling, const Columns& at) {
  const int64_t rows = query.size(0), heads = query.size(1), dim = query.size(2);
  const int64_t kv_heads = key.size(1), stride = at.capacity * dim;
  at::Tensor out = at::empty({rows, heads, dim}, query.options());
  by_type(query, [&](auto type) {
    using T = decltype(type);
    TORCH_CHECK(dim <= Step<T>::kMostDims && dim % kLanes == 0, "head dims of another size");
    const bool turned = cos.numel() == 0;
    const Step<T> step{Packed<T>(query), Packed<T>(key), Packed<T>(value), Packed<T>(out),
                       turned ? nullptr : data<T>(cos), turned ? nullptr : data<T>(sin), at,
                       heads / kv_heads, dim, static_cast<float>(scaling)};
    T* keys = data_out<T>(cache) + layer * cache.stride(0);
    T* values = keys + cache.size(0) / 2 * cache.stride(0);
    at::parallel_for(0, rows * kv_heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> space;
      for (int64_t task = begin; task < end; ++task)
        step.run(task / kv_heads, task % kv_heads, keys + task * stride, values + task * stride,
                 space);
    });
  });
  return out;
}

constexpr int64_t kPerLayer = 10;  // see decode_step

}  // namespace

// Final hidden states [B, d] of one new token per row; writes the cache's column.
//
// residual: embeddings [B, d], overwritten. weights, ten per layer: norm, qkv and its bias, output
// and its bias, norm, gate and up in one and their bias, down and its bias; then the final norm.
// cache [2 L, rows >= B, H_kv, capacity, D], keys of all layers first. padding int64 [B].
at::Tensor decode_step(at::Tensor& residual, const Weights& weights, at::Tensor& cache,
                       const at::Tensor& padding, int64_t prefix, int64_t column,
                       const at::Tensor& cos, const at::Tensor& sin, double scaling, double eps) {
  const int64_t rows = residual.size(0), layers = cache.size(0) / 2;
  const int64_t kv_heads = cache.size(2), dim = cache.size(4);
  const Columns at{prefix, column, cache.size(3), data<int64_t>(padding)};
  TORCH_CHECK(static_cast<int64_t>(weights.size()) == kPerLayer * layers + 1, "weights missing");
  const auto part = [&](int64_t i) { return std::optional<at::Tensor>(weights.get(i)); };
  at::Tensor normed = rms_norm(residual, *part(0), eps);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int64_t i = layer * kPerLayer;
    const at::Tensor qkv = project(normed, *part(i + 1), part(i + 2)).view({rows, -1, dim});
    const int64_t heads = qkv.size(1) - 2 * kv_heads;
    const auto q = qkv.narrow(1, 0, heads), k = qkv.narrow(1, heads, kv_heads);
    const auto v = qkv.narrow(1, heads + kv_heads, kv_heads);
    const at::Tensor attended =
        attend_layer(q, k, v, cos, sin, cache, layer, scaling, at).view({rows, -1});
    const at::Tensor more = project(attended, *part(i + 3), part(i + 4));
    normed = add_rms_norm_(residual, more, *part(i + 5), eps);
    const at::Tensor active = silu_mul(project(normed, *part(i + 6), part(i + 7)));
    normed = add_rms_norm_(residual, project(active, *part(i + 8), part(i + 9)),
                           *part(i + kPerLayer), eps);
  }
  return normed;
}

// One layer's decode attention, [B, H, D]; writes the cache's column. See decode_step.
at::Tensor decode_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            at::Tensor& cache, int64_t layer, const at::Tensor& padding,
                            int64_t prefix, int64_t column, double scaling) {
  const Columns at{prefix, column, cache.size(3), data<int64_t>(padding)};
  const at::Tensor none = at::empty({0}, query.options());
  return attend_layer(query, key, value, none, none, cache, layer, scaling, at);
}

TORCH_LIBRARY_FRAGMENT(rlprompt_cpu, m) {
  m.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) cache, int layer, "
      "Tensor padding, int prefix, int column, float scaling) -> Tensor",
      &decode_attention);
  m.def(
      "decode_step(Tensor(a!) residual, Tensor?[] weights, Tensor(b!) cache, Tensor padding, "
      "int prefix, int column, Tensor cos, Tensor sin, float scaling, float eps) -> Tensor",
      &decode_step);
}

}  // namespace rlprompt

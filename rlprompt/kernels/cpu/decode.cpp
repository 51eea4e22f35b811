// One decode step of a Llama-shaped base in a single call.
//
// A step of a small model for a few dozen rows is hundreds of tiny operations; starting each from
// Python costs more than computing it. The matrix products are torch's own (packed oneDNN ones
// where the weights are packed); everything between them is here, with the plain path's roundings.

#include "common.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

namespace rlprompt {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
at::Tensor add_rms_norm_(at::Tensor& residual, const at::Tensor& update, const at::Tensor& weight,
                         double eps);
at::Tensor silu_mul(const at::Tensor& x);
at::Tensor packed_product(const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, int64_t chunk);

namespace {

using Weights = c10::List<std::optional<at::Tensor>>;

// chunk: of `packed_product`, 0 where oneDNN is to multiply.
at::Tensor project(const at::Tensor& x, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, int64_t chunk) {
  if (chunk > 0) return packed_product(x, weight, bias, chunk);
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

// Where the columns of a cache stand: [prefix | padding of each row | seen up to `column`]. The
// first `shared` columns of a row are those of its leader, which are read in their place: they stay
// in the processor's cache when all rows of a group read one copy.
struct Columns {
  int64_t prefix, column, capacity, shared;
  const int64_t *padding, *leaders;
};

Columns columns_of(const at::Tensor& cache, const at::Tensor& table, at::IntArrayRef place) {
  TORCH_CHECK(table.size(0) == 2 && table.is_contiguous(), "rows want padding and leaders");
  const int64_t* rows = data<int64_t>(table);
  return {place[0], place[2], cache.size(3), place[1], rows, rows + table.size(1)};
}

// What one step does between the products of a layer.
template <typename T>
struct Step {
  Packed<T> query, key, value, out;
  const T *cos, *sin;  // [B, D]; null = queries and keys are turned already
  Columns at;
  int64_t share, dim;
  float scaling;

  // Scores of `seen` keys for all queries of one key/value head, then their outputs. Keys and values
  // are the row's own, the shared ones their leader's.
  void run(int64_t row, int64_t head, T* keys, T* values, const T* shared_keys,
           const T* shared_values, std::vector<float>& space) const {
    const int64_t first = at.prefix + at.padding[row], seen = at.prefix + at.column + 1 - first;
    const int64_t wide = padded(seen);
    space.resize(share * (wide + 2 * dim) + dim * wide);
    float *scores = space.data(), *q = scores + share * wide, *sums = q + share * dim;
    float* columns = sums + share * dim;
    write_column(row, head, keys, values);
    T turned[kMostDims];
    for (int64_t h = 0; h < share; ++h) {
      const T* from = turn(query.at(row, head * share + h), row, turned);
      for (int64_t d = 0; d < dim; ++d) q[h * dim + d] = rounded<T>(widen(from[d]) * scaling);
    }
    const auto key_at = [&](int64_t j) -> const T* {
      const int64_t place = j < at.prefix ? j : j - at.prefix + first;
      return (place < at.shared ? shared_keys : keys) + place * dim;
    };
    for (int64_t j = 0; j < seen; j += kLanes)
      write_columns<T>([&](int64_t i) { return key_at(j + i); },
                       std::min<int64_t>(kLanes, seen - j), dim, columns + j, wide);
    product(share, wide, dim, q, dim, 1, columns, wide, scores, wide, false);
    for (int64_t h = 0; h < share; ++h) softmax<T>(scores + h * wide, seen, wide);
    const int64_t query = at.shared - first, own = at.column + 1 - at.shared;
    product(share, dim, at.prefix, scores, wide, 1, shared_values, dim, sums, dim, false);
    product(share, dim, query, scores + at.prefix, wide, 1, shared_values + first * dim, dim, sums,
            dim, true);
    product(share, dim, own, scores + at.prefix + query, wide, 1, values + at.shared * dim, dim,
            sums, dim, true);
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
};

// Asks for the own columns of a row and head, which stand too far apart for the hardware to guess.
template <typename T>
void prefetch(const T* rows, const Columns& at, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (const T* p = rows + at.shared * dim; p < rows + at.column * dim; p += kLine)
    __builtin_prefetch(p);
}

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
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / kv_heads, head = task % kv_heads;
        if (task + 1 < end) {
          prefetch(keys + (task + 1) * stride, at, dim);
          prefetch(values + (task + 1) * stride, at, dim);
        }
        const int64_t leader = (at.leaders[row] * kv_heads + head) * stride;
        step.run(row, head, keys + task * stride, values + task * stride, keys + leader,
                 values + leader, space);
      }
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
// cache [2 L, rows >= B, H_kv, capacity, D], keys of all layers first. table int64 [2, at least B]:
// padding and leader of each row (see Columns). place: prefix, shared and the column to write.
// chunks: see `project`, of the four products of a layer.
at::Tensor decode_step(at::Tensor& residual, const Weights& weights, at::Tensor& cache,
                       const at::Tensor& table, at::IntArrayRef place, const at::Tensor& cos,
                       const at::Tensor& sin, double scaling, double eps, at::IntArrayRef chunks) {
  const int64_t rows = residual.size(0), layers = cache.size(0) / 2;
  const int64_t kv_heads = cache.size(2), dim = cache.size(4);
  const Columns at = columns_of(cache, table, place);
  TORCH_CHECK(static_cast<int64_t>(weights.size()) == kPerLayer * layers + 1, "weights missing");
  TORCH_CHECK(chunks.size() == 4, "chunks missing");
  const auto part = [&](int64_t i) { return std::optional<at::Tensor>(weights.get(i)); };
  at::Tensor normed = rms_norm(residual, *part(0), eps);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int64_t i = layer * kPerLayer;
    const at::Tensor joined = project(normed, *part(i + 1), part(i + 2), chunks[0]);
    const at::Tensor qkv = joined.view({rows, -1, dim});
    const int64_t heads = qkv.size(1) - 2 * kv_heads;
    const auto q = qkv.narrow(1, 0, heads), k = qkv.narrow(1, heads, kv_heads);
    const auto v = qkv.narrow(1, heads + kv_heads, kv_heads);
    const at::Tensor attended =
        attend_layer(q, k, v, cos, sin, cache, layer, scaling, at).view({rows, -1});
    const at::Tensor more = project(attended, *part(i + 3), part(i + 4), chunks[1]);
    normed = add_rms_norm_(residual, more, *part(i + 5), eps);
    const at::Tensor active = silu_mul(project(normed, *part(i + 6), part(i + 7), chunks[2]));
    const at::Tensor last = project(active, *part(i + 8), part(i + 9), chunks[3]);
    normed = add_rms_norm_(residual, last, *part(i + kPerLayer), eps);
  }
  return normed;
}

// One layer's decode attention, [B, H, D]; writes the cache's column. See decode_step.
at::Tensor decode_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            at::Tensor& cache, int64_t layer, const at::Tensor& table,
                            at::IntArrayRef place, double scaling) {
  const Columns at = columns_of(cache, table, place);
  const at::Tensor none = at::empty({0}, query.options());
  return attend_layer(query, key, value, none, none, cache, layer, scaling, at);
}

TORCH_LIBRARY_FRAGMENT(rlprompt_cpu, m) {
  m.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) cache, int layer, "
      "Tensor table, int[] place, float scaling) -> Tensor",
      &decode_attention);
  m.def(
      "decode_step(Tensor(a!) residual, Tensor?[] weights, Tensor(b!) cache, Tensor table, "
      "int[] place, Tensor cos, Tensor sin, float scaling, float eps, int[] chunks) -> Tensor",
      &decode_step);
}

}  // namespace rlprompt

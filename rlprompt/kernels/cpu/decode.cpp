// One decode step of a Llama-shaped base in a single call.
//
// A step of a small model for a few dozen rows is hundreds of tiny operations; starting each from
// Python costs more than computing it. The matrix products are torch's own (packed oneDNN ones
// where the weights are packed); everything between them is here, with the plain path's roundings.

#include "product.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

namespace rlprompt {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
at::Tensor add_rms_norm_(at::Tensor& residual, const at::Tensor& update, const at::Tensor& weight,
                         double eps);
at::Tensor silu_mul(const at::Tensor& x);

namespace {

using Weights = c10::List<std::optional<at::Tensor>>;

at::Tensor onednn_product(const at::Tensor& x, const at::Tensor& weight,
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

// What an adapter adds to a product; empty tensors = nothing. next: down of the product after it.
struct LowRank {
  std::optional<at::Tensor> down, up, starts, next;
  double scale;
};

// chunk: of `packed_product`, 0 where oneDNN is to multiply. The result stands in `kept` if there is
// one, dense rows of a larger tensor.
at::Tensor project(const at::Tensor& x, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, int64_t chunk, const LowRank& low_rank,
                   std::optional<at::Tensor> kept) {
  at::Tensor inner;
  if (low_rank.down) inner = low_rank_inner(x, *low_rank.down, low_rank.scale);
  if (chunk > 0) {
    at::Tensor out = kept ? *kept : at::empty({x.size(0), weight.size(0)}, x.options());
    std::optional<Addition> addition;
    if (low_rank.down)
      addition = addition_of(inner, *low_rank.up, *low_rank.starts, weight.size(0));
    Soon soon;
    if (low_rank.next) soon = {data<char>(*low_rank.next), static_cast<int64_t>(low_rank.next->nbytes())};
    packed_product_into(out, x, weight, bias, chunk, addition ? &*addition : nullptr, soon);
    return out;
  }
  at::Tensor out = onednn_product(x, weight, bias);
  if (low_rank.down) low_rank_add_(out, inner, *low_rank.up, *low_rank.starts);
  if (kept) kept->copy_(out);
  return out;
}

// Where the columns of a cache stand. A row's columns are its tokens, [prefix | query | completion];
// those of rows with a shorter query stand `padding` places earlier. Whole blocks of columns that a
// row shares with its leader are read there: they stay in the processor's cache when all rows of a
// group read one copy.
struct Columns {
  int64_t column, shared;  // of a row without padding: the one to write; how many are shared
  int64_t capacity;
  const int64_t *padding, *leaders;
};

Columns columns_of(const at::Tensor& cache, const at::Tensor& table, at::IntArrayRef place) {
  TORCH_CHECK(table.size(0) == 2 && table.is_contiguous(), "rows want padding and leaders");
  TORCH_CHECK(cache.is_contiguous() && cache.size(3) % kLanes == 0, "columns want whole blocks");
  TORCH_CHECK(place[1] < cache.size(3), "the cache is full");
  const int64_t* rows = data<int64_t>(table);
  return {place[1], place[0], cache.size(3), rows, rows + table.size(1)};
}

// Keys or values of one row and head, arranged (see put_key, put_value).
struct Own {
  uint32_t* own;
  const uint32_t* shared;  // its leader's
};

// What one step does between the products of a layer.
struct Step {
  Packed<bf16> query, key, value, out;
  const bf16 *cos, *sin;  // [B, D]; null = queries and keys are turned already
  Columns at;
  int64_t share, dim;
  float scaling;

  // Of one thread.
  struct Space {
    Pairs q, weights;
    std::vector<float> scores, sums;
  };

  // Writes a row's new column, and attends with all queries of one key/value head.
  void run(int64_t row, int64_t head, const Own& keys, const Own& values, Space& space) const {
    const int64_t last = at.column - at.padding[row], wide = padded(last + 1);
    const int64_t common = (at.shared - at.padding[row]) / kLanes * kLanes;
    space.q.resize(share * dim / 2);
    space.weights.resize(share * wide / 2);
    space.scores.resize(share * wide);
    space.sums.resize(share * dim);
    bf16 turned[kMostDims];
    put_key(turn(key.at(row, head), row, turned), last, dim, keys.own);
    put_value(value.at(row, head), last, dim, values.own);
    for (int64_t h = 0; h < share; ++h) {
      const bf16* from = turn(query.at(row, head * share + h), row, turned);
      bf16* to = reinterpret_cast<bf16*>(&space.q[h * dim / 2]);
      for (int64_t d = 0; d < dim; d += kLanes) store(to + d, load(from + d) * scaling);
    }
    score(keys.shared, 0, common, wide, space);
    score(keys.own, common, wide, wide, space);
    for (int64_t h = 0; h < share; ++h)
      softmax(&space.scores[h * wide], reinterpret_cast<bf16*>(&space.weights[h * wide / 2]),
              last + 1, wide);
    weigh(values.shared, 0, common, wide, Into::kFresh, space);
    weigh(values.own, common, wide, wide, Into::kContinue, space);
    for (int64_t h = 0; h < share; ++h) {
      bf16* to = out.at(row, head * share + h);
      for (int64_t d = 0; d < dim; d += kLanes) store(to + d, load(&space.sums[h * dim + d]));
    }
  }

  static constexpr int64_t kMostDims = 512;

 private:
  // Scores of the columns [first, end), whole blocks.
  void score(const uint32_t* keys, int64_t first, int64_t end, int64_t wide, Space& space) const {
    product(share, end - first, dim / 2, space.q.data(), dim / 2, 1,
            {keys + first * dim / 2, kLanes, dim / 2 * kLanes}, &space.scores[first], wide,
            Into::kFresh);
  }

  // Values of the columns [first, end), an even number, times their weights.
  void weigh(const uint32_t* values, int64_t first, int64_t end, int64_t wide, Into into,
             Space& space) const {
    product(share, dim, (end - first) / 2, space.weights.data() + first / 2, wide / 2, 1,
            {values + first * dim / 2, dim}, space.sums.data(), dim, into);
  }

  const bf16* turn(const bf16* from, int64_t row, bf16* turned) const {
    if (cos == nullptr) return from;
    rotate(from, cos + row * dim, sin + row * dim, turned, dim, false);
    return turned;
  }
};

// Asks for the own columns of a row and head, which stand too far apart for the hardware to guess.
void prefetch(const uint32_t* rows, const Columns& at, int64_t row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(uint32_t);
  const int64_t first = (at.shared - at.padding[row]) / kLanes * kLanes;
  const int64_t end = padded(at.column - at.padding[row] + 1);
  for (const uint32_t* p = rows + first * dim / 2; p < rows + end * dim / 2; p += kLine)
    __builtin_prefetch(p);
}

// Writes the new column of one layer and attends: [B, H, D]. Queries [B, H, D], key and value
// [B, H_kv, D]; cos and sin [B, D], or empty where queries and keys are turned already.
at::Tensor attend_layer(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const at::Tensor& cos, const at::Tensor& sin, at::Tensor& cache,
                        int64_t layer, double scaling, const Columns& at) {
  const int64_t rows = query.size(0), heads = query.size(1), dim = query.size(2);
  const int64_t kv_heads = key.size(1), stride = at.capacity * dim / 2;
  at::Tensor out = at::empty({rows, heads, dim}, query.options());
  TORCH_CHECK(query.scalar_type() == at::kBFloat16, "decode attention takes bfloat16");
  TORCH_CHECK(dim <= Step::kMostDims && dim % kLanes == 0, "head dims of another size");
  const bool turned = cos.numel() == 0;
  const Step step{Packed<bf16>(query), Packed<bf16>(key), Packed<bf16>(value), Packed<bf16>(out),
                  turned ? nullptr : data<bf16>(cos), turned ? nullptr : data<bf16>(sin), at,
                  heads / kv_heads, dim, static_cast<float>(scaling)};
  const auto part = [&](int64_t i) {
    return reinterpret_cast<uint32_t*>(data_out<bf16>(cache) + i * cache.stride(0));
  };
  uint32_t *keys = part(layer), *values = part(cache.size(0) / 2 + layer);
  at::parallel_for(0, rows * kv_heads, 1, [&](int64_t begin, int64_t end) {
    Step::Space space;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / kv_heads, head = task % kv_heads;
      if (task + 1 < end) {
        prefetch(keys + (task + 1) * stride, at, (task + 1) / kv_heads, dim);
        prefetch(values + (task + 1) * stride, at, (task + 1) / kv_heads, dim);
      }
      const int64_t leader = (at.leaders[row] * kv_heads + head) * stride;
      step.run(row, head, {keys + task * stride, keys + leader},
               {values + task * stride, values + leader}, space);
    }
  });
  return out;
}

constexpr int64_t kProducts = 4;               // of a layer
constexpr int64_t kPerLayer = 2 * kProducts + 2;  // see decode_step
constexpr int64_t kParts = 3;                  // of what an adapter adds to a product

}  // namespace

// Final hidden states [B, d] of one new token per row; writes the cache's column.
//
// residual: embeddings [B, d], overwritten. weights, ten per layer: norm, qkv and its bias, output
// and its bias, norm, gate and up in one and their bias, down and its bias; then the final norm.
// cache [2 L, rows >= B, H_kv, capacity, D], arranged, keys of all layers first. table int64 [2, at
// least B]: padding and leader of each row. place: how many columns are shared, the one to write.
// chunks: see `project`, of the four products of a layer. low_rank: none, or down, up and starts of
// each product of each layer, where an adapter has them (see low_rank.h). stores: none, or for each
// product of each layer a tensor [n, out] whose rows from `stored` on get its output, with what the
// adapter adds.
at::Tensor decode_step(at::Tensor& residual, const Weights& weights, at::Tensor& cache,
                       const at::Tensor& table, at::IntArrayRef place, const at::Tensor& cos,
                       const at::Tensor& sin, double scaling, double eps, at::IntArrayRef chunks,
                       const Weights& low_rank, double low_rank_scale, const Weights& stores,
                       int64_t stored) {
  const int64_t rows = residual.size(0), layers = cache.size(0) / 2;
  const int64_t kv_heads = cache.size(2), dim = cache.size(4);
  const Columns at = columns_of(cache, table, place);
  TORCH_CHECK(static_cast<int64_t>(weights.size()) == kPerLayer * layers + 1, "weights missing");
  TORCH_CHECK(chunks.size() == kProducts, "chunks missing");
  const auto additions = static_cast<int64_t>(low_rank.size());
  TORCH_CHECK(additions == 0 || additions == kParts * kProducts * layers,
              "low-rank parts missing");
  const auto part = [&](int64_t i) { return std::optional<at::Tensor>(weights.get(i)); };
  const auto multiply = [&](const at::Tensor& x, int64_t layer, int64_t product) {
    const int64_t i = layer * kPerLayer + (product < 2 ? 1 : 2) + 2 * product;
    std::optional<at::Tensor> kept;
    if (stores.size() > 0) kept = stores.get(layer * kProducts + product);
    if (kept) kept = kept->narrow(0, stored, rows);
    LowRank added{};
    if (additions > 0) {
      const int64_t j = kParts * (layer * kProducts + product);
      added = {low_rank.get(j), low_rank.get(j + 1), low_rank.get(j + 2), {}, low_rank_scale};
      if (j + kParts < additions) added.next = low_rank.get(j + kParts);
    }
    return project(x, *part(i), part(i + 1), chunks[product], added, kept);
  };
  at::Tensor normed = rms_norm(residual, *part(0), eps);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int64_t i = layer * kPerLayer;
    const at::Tensor joined = multiply(normed, layer, 0);
    const at::Tensor qkv = joined.view({rows, -1, dim});
    const int64_t heads = qkv.size(1) - 2 * kv_heads;
    const auto q = qkv.narrow(1, 0, heads), k = qkv.narrow(1, heads, kv_heads);
    const auto v = qkv.narrow(1, heads + kv_heads, kv_heads);
    const at::Tensor attended =
        attend_layer(q, k, v, cos, sin, cache, layer, scaling, at).view({rows, -1});
    const at::Tensor more = multiply(attended, layer, 1);
    normed = add_rms_norm_(residual, more, *part(i + 5), eps);
    const at::Tensor active = silu_mul(multiply(normed, layer, 2));
    const at::Tensor last = multiply(active, layer, 3);
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
      "int[] place, Tensor cos, Tensor sin, float scaling, float eps, int[] chunks, "
      "Tensor?[] low_rank, float low_rank_scale, Tensor?[] stores, int stored) -> Tensor",
      &decode_step);
}

}  // namespace rlprompt

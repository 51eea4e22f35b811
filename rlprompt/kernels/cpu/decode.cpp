// One decode step of a Llama-shaped base in a single call.
//
// A step of a small model for a few dozen rows is hundreds of tiny operations; starting each from
// Python costs more than computing it, and starting each as a parallel loop still costs a tenth of
// it. So one team of threads runs the whole step. Where oneDNN multiplies (more rows, or weights in
// another layout), each part is a loop of its own. Roundings are the plain path's.

#include "elementwise.h"
#include "product.h"
#include "team.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

namespace rlprompt {
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

// Decode attention of one layer: writes the new column of every row, and attends.
struct Attention {
  Step step;
  uint32_t *keys, *values;          // of the layer
  int64_t rows, kv_heads, stride;   // stride: from one row and head to the next

  int64_t tasks() const { return rows * kv_heads; }

  void run(int64_t begin, int64_t end) const {
    static thread_local Step::Space space;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / kv_heads, head = task % kv_heads;
      if (task + 1 < end) {
        prefetch(keys + (task + 1) * stride, (task + 1) / kv_heads);
        prefetch(values + (task + 1) * stride, (task + 1) / kv_heads);
      }
      const int64_t leader = (step.at.leaders[row] * kv_heads + head) * stride;
      step.run(row, head, {keys + task * stride, keys + leader},
               {values + task * stride, values + leader}, space);
    }
  }

 private:
  // Asks for the own columns of a row and head: they stand too far apart for the hardware to guess.
  void prefetch(const uint32_t* columns, int64_t row) const {
    constexpr int64_t kLine = 64 / sizeof(uint32_t);
    const Columns& at = step.at;
    const int64_t first = (at.shared - at.padding[row]) / kLanes * kLanes;
    const int64_t end = padded(at.column - at.padding[row] + 1), pairs = step.dim / 2;
    for (const uint32_t* p = columns + first * pairs; p < columns + end * pairs; p += kLine)
      __builtin_prefetch(p);
  }
};

// Queries [B, H, D], keys and values [B, H_kv, D] of the new token, and the output [B, H, D].
struct Heads {
  Packed<bf16> query, key, value, out;
  int64_t rows, heads, kv_heads, dim;
};

// cos and sin [B, D], null where queries and keys are turned already.
Attention attention_of(const Heads& of, const bf16* cos, const bf16* sin, at::Tensor& cache,
                       int64_t layer, double scaling, const Columns& at) {
  TORCH_CHECK(of.dim <= Step::kMostDims && of.dim % kLanes == 0, "head dims of another size");
  const Step step{of.query, of.key, of.value, of.out, cos, sin, at, of.heads / of.kv_heads, of.dim,
                  static_cast<float>(scaling)};
  const auto part = [&](int64_t i) {
    return reinterpret_cast<uint32_t*>(data_out<bf16>(cache) + i * cache.stride(0));
  };
  return {step, part(layer), part(cache.size(0) / 2 + layer), of.rows, of.kv_heads,
          at.capacity * of.dim / 2};
}

constexpr int64_t kProducts = 4;                  // of a layer
constexpr int64_t kPerLayer = 2 * kProducts + 2;  // weights; see decode_step
constexpr int64_t kParts = 3;                     // of what an adapter adds to a product

// One product of a layer, with what an adapter adds; `down` empty = nothing. packed.chunk = 0 where
// oneDNN is to multiply.
struct Multiplication {
  at::Tensor x, out, weight;  // [B, K], [B, O], [O, K]
  std::optional<at::Tensor> bias, down, up, starts;
  double scale = 1.0;
  Inner inner;
  PackedProduct packed;

  void run(Team& team) const {
    if (down) team.split(inner.tasks(), [&](int64_t begin, int64_t end) { inner.run(begin, end); });
    team.split(packed.units(), [&](int64_t begin, int64_t end) { packed.run(begin, end); });
  }

  void run(Loops&) const {
    at::Tensor sum = onednn_product(x, weight, bias);
    if (down) low_rank_add_(sum, low_rank_inner(x, *down, scale), *up, *starts);
    at::Tensor(out).copy_(sum);
  }
};

struct Layer {
  Multiplication products[kProducts];
  Attention attention;
  const bf16 *norm, *next_norm;  // behind attention, and behind the gated part
};

// A step, ready to run.
struct Program {
  std::vector<Layer> layers;
  bf16 *residual, *normed, *active;
  const bf16* first_norm;
  int64_t rows, width, mlp;
  float eps;

  template <typename Threads>
  void run(Threads& threads) const {
    threads.split(rows, [&](int64_t begin, int64_t end) {
      norm_rows(residual, first_norm, normed, width, eps, begin, end);
    });
    for (const Layer& layer : layers) {
      layer.products[0].run(threads);
      threads.split(layer.attention.tasks(),
                    [&](int64_t begin, int64_t end) { layer.attention.run(begin, end); });
      layer.products[1].run(threads);
      add(threads, layer.products[1].out, layer.norm);
      layer.products[2].run(threads);
      const bf16* gates = data<bf16>(layer.products[2].out);
      threads.split(rows, [&](int64_t begin, int64_t end) {
        gate_rows(gates, active, mlp, begin, end);
      });
      layer.products[3].run(threads);
      add(threads, layer.products[3].out, layer.next_norm);
    }
  }

 private:
  template <typename Threads>
  void add(Threads& threads, const at::Tensor& update, const bf16* norm) const {
    const bf16* more = data<bf16>(update);
    threads.split(rows, [&](int64_t begin, int64_t end) {
      add_norm_rows(residual, more, norm, normed, width, eps, begin, end);
    });
  }
};

// Memory that all layers use, one after another.
struct Space {
  at::Tensor normed, attended, active, inner;  // [B, d], [B, H D], [B, I], as many inner states
  at::Tensor outs[kProducts];                  // where nothing is stored
};

}  // namespace

// Final hidden states [B, d] of one new token per row; writes the cache's column.
//
// residual: embeddings [B, d], overwritten. weights, ten per layer: norm, qkv and its bias, output
// and its bias, norm, gate and up in one and their bias, down and its bias; then the final norm.
// cache [2 L, rows >= B, H_kv, capacity, D], arranged, keys of all layers first. table int64 [2, at
// least B]: padding and leader of each row. place: how many columns are shared, the one to write.
// chunks: of the four products of a layer (see product.cpp), all zero where oneDNN is to multiply.
// low_rank: none, or down, up and starts of each product of each layer, where an adapter has them
// (see low_rank.h). stores: none, or for each product of each layer a tensor [n, out] whose rows from
// `stored` on get its output, with what the adapter adds.
at::Tensor decode_step(at::Tensor& residual, const Weights& weights, at::Tensor& cache,
                       const at::Tensor& table, at::IntArrayRef place, const at::Tensor& cos,
                       const at::Tensor& sin, double scaling, double eps, at::IntArrayRef chunks,
                       const Weights& low_rank, double low_rank_scale, const Weights& stores,
                       int64_t stored) {
  const int64_t rows = residual.size(0), width = residual.size(1), layers = cache.size(0) / 2;
  const int64_t kv_heads = cache.size(2), dim = cache.size(4);
  const Columns at = columns_of(cache, table, place);
  TORCH_CHECK(static_cast<int64_t>(weights.size()) == kPerLayer * layers + 1, "weights missing");
  TORCH_CHECK(residual.scalar_type() == at::kBFloat16 && residual.is_contiguous() &&
                  cos.is_contiguous() && sin.is_contiguous(),
              "decode steps take dense bfloat16");
  TORCH_CHECK(chunks.size() == kProducts, "chunks missing");
  const bool packed = chunks[0] > 0;
  for (const int64_t chunk : chunks)
    TORCH_CHECK((chunk > 0) == packed, "all products of a step are multiplied in one way");
  const auto additions = static_cast<int64_t>(low_rank.size());
  TORCH_CHECK(additions == 0 || additions == kParts * kProducts * layers,
              "low-rank parts missing");
  const auto weight = [&](int64_t i) { return *std::optional<at::Tensor>(weights.get(i)); };
  const auto room = [&](int64_t columns) { return at::empty({rows, columns}, residual.options()); };
  // Of product i, the outputs; of a layer, product i has the weight kPlaces[i].
  constexpr int64_t kPlaces[kProducts] = {1, 3, 6, 8};
  const auto outputs = [&](int64_t i) { return weight(kPlaces[i]).size(0); };
  const int64_t heads = outputs(0) / dim - 2 * kv_heads;
  int64_t most_inner = 0;
  for (int64_t j = 0; j < additions; j += kParts)
    if (const std::optional<at::Tensor> down = low_rank.get(j))
      most_inner = std::max(most_inner, down->size(1));
  Space space{room(width), room(heads * dim), room(outputs(2) / 2), room(most_inner)};
  for (int64_t i = 0; i < kProducts; ++i) space.outs[i] = room(outputs(i));
  const at::Tensor* inputs[kProducts] = {&space.normed, &space.attended, &space.normed,
                                         &space.active};
  const auto multiplication = [&](int64_t layer, int64_t i) {
    const int64_t product = layer * kProducts + i, j = kParts * product;
    Multiplication made{*inputs[i], space.outs[i], weight(layer * kPerLayer + kPlaces[i]),
                        weights.get(layer * kPerLayer + kPlaces[i] + 1)};
    if (stores.size() > 0)
      if (const std::optional<at::Tensor> store = stores.get(product))
        made.out = store->narrow(0, stored, rows);
    if (additions > 0) {
      made.down = low_rank.get(j), made.up = low_rank.get(j + 1);
      made.starts = low_rank.get(j + 2), made.scale = low_rank_scale;
    }
    if (!packed) return made;
    const bf16* x = data<bf16>(made.x);
    made.packed =
        packed_product_of(x, rows, made.weight, made.bias, chunks[i], data_out<bf16>(made.out));
    TORCH_CHECK(made.packed.inputs == made.x.size(1), "a weight of another shape");
    if (made.down) {
      bf16* states = data_out<bf16>(space.inner);
      made.inner = inner_of(x, rows, made.packed.inputs, *made.down, made.scale, states);
      made.packed.addition =
          addition_of(states, made.inner.width, *made.up, *made.starts, made.packed.outputs);
    }
    if (j + kParts < additions)
      if (const std::optional<at::Tensor> next = low_rank.get(j + kParts))
        made.packed.soon = {data<char>(*next), static_cast<int64_t>(next->nbytes())};
    return made;
  };
  Program program{{}, data_out<bf16>(residual), data_out<bf16>(space.normed),
                  data_out<bf16>(space.active), data<bf16>(weight(0)), rows, width,
                  outputs(2) / 2, static_cast<float>(eps)};
  program.layers.reserve(layers);
  for (int64_t l = 0; l < layers; ++l) {
    Multiplication joined = multiplication(l, 0);
    const at::Tensor qkv = joined.out.view({rows, -1, dim});
    const Heads of{Packed<bf16>(qkv), Packed<bf16>(qkv.narrow(1, heads, kv_heads)),
                   Packed<bf16>(qkv.narrow(1, heads + kv_heads, kv_heads)),
                   Packed<bf16>(space.attended.view({rows, heads, dim})), rows, heads, kv_heads,
                   dim};
    program.layers.push_back(
        {{std::move(joined), multiplication(l, 1), multiplication(l, 2), multiplication(l, 3)},
         attention_of(of, data<bf16>(cos), data<bf16>(sin), cache, l, scaling, at),
         data<bf16>(weight(l * kPerLayer + 5)),
         data<bf16>(weight((l + 1) * kPerLayer))});
  }
  if (packed) {
    Team::run([&](Team& team) { program.run(team); });
  } else {
    Loops loops;
    program.run(loops);
  }
  return space.normed;
}

// One layer's decode attention, [B, H, D]; writes the cache's column. Queries [B, H, D], key and
// value [B, H_kv, D]. See decode_step.
at::Tensor decode_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            at::Tensor& cache, int64_t layer, const at::Tensor& table,
                            at::IntArrayRef place, double scaling) {
  TORCH_CHECK(query.scalar_type() == at::kBFloat16, "decode attention takes bfloat16");
  const Columns at = columns_of(cache, table, place);
  at::Tensor out = at::empty({query.size(0), query.size(1), query.size(2)}, query.options());
  const Heads of{Packed<bf16>(query), Packed<bf16>(key), Packed<bf16>(value), Packed<bf16>(out),
                 query.size(0), query.size(1), key.size(1), query.size(2)};
  const Attention attention = attention_of(of, nullptr, nullptr, cache, layer, scaling, at);
  at::parallel_for(0, attention.tasks(), 1,
                   [&](int64_t begin, int64_t end) { attention.run(begin, end); });
  return out;
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

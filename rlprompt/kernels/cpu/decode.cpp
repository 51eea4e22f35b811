// One decode step of a Llama-shaped base in a single call.
//
// A step of a small model for a few dozen rows is hundreds of tiny operations; starting each from
// Python costs more than computing it, and starting each as a parallel loop still costs a tenth of
// it. So one team of threads runs the whole step. Where oneDNN multiplies (more rows, or weights in
// another layout), each part is a loop of its own. Roundings are the plain path's.

#include "decode_attention.h"
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

constexpr int64_t kProducts = 4;                  // of a layer
constexpr int64_t kPerLayer = 2 * kProducts + 2;  // weights; see decode_step
constexpr int64_t kPlaces[kProducts] = {1, 3, 6, 8};  // of the products' weights among them
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

// What decode_step is called with.
struct Call {
  at::Tensor &residual, &cache;
  const Weights &weights, &low_rank, &stores;
  const at::Tensor &cos, &sin;
  Columns at;
  at::IntArrayRef chunks;
  double scaling, eps, low_rank_scale;
  int64_t stored;

  int64_t rows() const { return residual.size(0); }
  int64_t layers() const { return cache.size(0) / 2; }
  int64_t additions() const { return static_cast<int64_t>(low_rank.size()); }
  bool is_packed() const { return chunks[0] > 0; }
  at::Tensor weight(int64_t i) const { return *std::optional<at::Tensor>(weights.get(i)); }
  int64_t outputs(int64_t product) const { return weight(kPlaces[product]).size(0); }
  int64_t heads() const { return outputs(0) / cache.size(4) - 2 * cache.size(2); }

  void check() const {
    TORCH_CHECK(static_cast<int64_t>(weights.size()) == kPerLayer * layers() + 1,
                "weights missing");
    TORCH_CHECK(residual.scalar_type() == at::kBFloat16 && residual.is_contiguous() &&
                    cos.is_contiguous() && sin.is_contiguous(),
                "decode steps take dense bfloat16");
    TORCH_CHECK(chunks.size() == kProducts, "chunks missing");
    for (const int64_t chunk : chunks)
      TORCH_CHECK((chunk > 0) == is_packed(), "all products of a step are multiplied in one way");
    TORCH_CHECK(additions() == 0 || additions() == kParts * kProducts * layers(),
                "low-rank parts missing");
  }
};

// Memory that all layers use, one after another.
struct Space {
  at::Tensor normed, attended, active, inner;  // [B, d], [B, H D], [B, I], as many inner states
  at::Tensor outs[kProducts];                  // where nothing is stored

  explicit Space(const Call& call) {
    const auto room = [&](int64_t columns) {
      return at::empty({call.rows(), columns}, call.residual.options());
    };
    int64_t most_inner = 0;
    for (int64_t j = 0; j < call.additions(); j += kParts)
      if (const std::optional<at::Tensor> down = call.low_rank.get(j))
        most_inner = std::max(most_inner, down->size(1));
    normed = room(call.residual.size(1)), attended = room(call.heads() * call.cache.size(4));
    active = room(call.outputs(2) / 2), inner = room(most_inner);
    for (int64_t i = 0; i < kProducts; ++i) outs[i] = room(call.outputs(i));
  }

  // What product i of a layer multiplies.
  const at::Tensor& input(int64_t i) const { return i == 1 ? attended : i == 3 ? active : normed; }
};

// Adds what the team needs, where it multiplies.
void pack(Multiplication& made, int64_t chunk, at::Tensor& inner,
          const std::optional<at::Tensor>& next) {
  const bf16* x = data<bf16>(made.x);
  const int64_t rows = made.x.size(0), inputs = made.x.size(1);
  made.packed = packed_product_of(x, rows, made.weight, made.bias, chunk, data_out<bf16>(made.out));
  TORCH_CHECK(made.packed.inputs == inputs, "a weight of another shape");
  if (made.down) {
    bf16* states = data_out<bf16>(inner);
    made.inner = inner_of(x, rows, inputs, *made.down, made.scale, states);
    made.packed.addition =
        addition_of(states, made.inner.width, *made.up, *made.starts, made.packed.outputs);
  }
  if (next) made.packed.soon = {data<char>(*next), static_cast<int64_t>(next->nbytes())};
}

Multiplication multiplication_of(const Call& call, Space& space, int64_t layer, int64_t i) {
  const int64_t product = layer * kProducts + i, j = kParts * product;
  const int64_t place = layer * kPerLayer + kPlaces[i];
  Multiplication made{space.input(i), space.outs[i], call.weight(place),
                      call.weights.get(place + 1)};
  if (call.stores.size() > 0)
    if (const std::optional<at::Tensor> store = call.stores.get(product))
      made.out = store->narrow(0, call.stored, call.rows());
  if (call.additions() > 0) {
    made.down = call.low_rank.get(j), made.up = call.low_rank.get(j + 1);
    made.starts = call.low_rank.get(j + 2), made.scale = call.low_rank_scale;
  }
  std::optional<at::Tensor> next;
  if (j + kParts < call.additions()) next = call.low_rank.get(j + kParts);
  if (call.is_packed()) pack(made, call.chunks[i], space.inner, next);
  return made;
}

Attention attention_of(const Call& call, const at::Tensor& joined, const at::Tensor& out,
                       int64_t layer) {
  const int64_t rows = call.rows(), heads = call.heads();
  const int64_t kv_heads = call.cache.size(2), dim = call.cache.size(4);
  const at::Tensor qkv = joined.view({rows, -1, dim});
  const auto k = qkv.narrow(1, heads, kv_heads), v = qkv.narrow(1, heads + kv_heads, kv_heads);
  const Heads of{Packed<bf16>(qkv), Packed<bf16>(k), Packed<bf16>(v),
                 Packed<bf16>(out.view({rows, heads, dim})), rows, heads, kv_heads, dim};
  return attention_of(of, data<bf16>(call.cos), data<bf16>(call.sin), call.at, call.cache, layer,
                      call.scaling);
}

Program program_of(const Call& call, Space& space) {
  Program program{{},
                  data_out<bf16>(call.residual),
                  data_out<bf16>(space.normed),
                  data_out<bf16>(space.active),
                  data<bf16>(call.weight(0)),
                  call.rows(),
                  call.residual.size(1),
                  space.active.size(1),
                  static_cast<float>(call.eps)};
  program.layers.reserve(call.layers());
  for (int64_t l = 0; l < call.layers(); ++l) {
    const auto product = [&](int64_t i) { return multiplication_of(call, space, l, i); };
    Multiplication joined = product(0);
    const Attention attention = attention_of(call, joined.out, space.attended, l);
    program.layers.push_back({{std::move(joined), product(1), product(2), product(3)},
                              attention,
                              data<bf16>(call.weight(l * kPerLayer + 5)),
                              data<bf16>(call.weight((l + 1) * kPerLayer))});
  }
  return program;
}

}  // namespace

// Final hidden states [B, d] of one new token per row; writes the cache's column.
//
// residual: embeddings [B, d], overwritten. weights, ten per layer: norm, qkv and its bias, output
// and its bias, norm, gate and up in one and their bias, down and its bias; then the final norm.
// cache [2 L, rows >= B, H_kv, capacity, D], in the order of cache_layout.py, keys of all layers
// first. table int64 [2, at least B]: padding and leader of each row. place: how many columns are shared, the one to write.
// chunks: of the four products of a layer (see product.cpp), all zero where oneDNN is to multiply.
// low_rank: none, or down, up and starts of each product of each layer, where an adapter has them
// (see low_rank.h). stores: none, or for each product of each layer a tensor [n, out] whose rows
// from `stored` on get its output, with what the adapter adds.
at::Tensor decode_step(at::Tensor& residual, const Weights& weights, at::Tensor& cache,
                       const at::Tensor& table, at::IntArrayRef place, const at::Tensor& cos,
                       const at::Tensor& sin, double scaling, double eps, at::IntArrayRef chunks,
                       const Weights& low_rank, double low_rank_scale, const Weights& stores,
                       int64_t stored) {
  const Call call{.residual = residual,
                  .cache = cache,
                  .weights = weights,
                  .low_rank = low_rank,
                  .stores = stores,
                  .cos = cos,
                  .sin = sin,
                  .at = columns_of(cache, table, place),
                  .chunks = chunks,
                  .scaling = scaling,
                  .eps = eps,
                  .low_rank_scale = low_rank_scale,
                  .stored = stored};
  call.check();
  Space space(call);
  const Program program = program_of(call, space);
  if (call.is_packed()) {
    Team::run([&](Team& team) { program.run(team); });
  } else {
    Loops loops;
    program.run(loops);
  }
  return space.normed;
}

TORCH_LIBRARY_FRAGMENT(rlprompt_cpu, m) {
  m.def(
      "decode_step(Tensor(a!) residual, Tensor?[] weights, Tensor(b!) cache, Tensor table, "
      "int[] place, Tensor cos, Tensor sin, float scaling, float eps, int[] chunks, "
      "Tensor?[] low_rank, float low_rank_scale, Tensor?[] stores, int stored) -> Tensor",
      &decode_step);
}

}  // namespace rlprompt

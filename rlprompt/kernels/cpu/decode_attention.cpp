// Decode attention: writes one column per row, and attends to all that a row has.

#include "decode_attention.h"

#include <ATen/ops/empty.h>

namespace rlprompt {
namespace {

constexpr int64_t kMostDims = 512;

// Keys or values of one row and head, as put_key and put_value lay them out.
struct Own {
  uint32_t* own;
  const uint32_t* shared;  // its leader's
};

struct Step : Attention {
  // Of one thread.
  struct Space {
    Pairs q, weights;
    std::vector<float> scores, sums;
  };

  // Writes a row's new column, and attends with all queries of one key/value head.
  void run(int64_t row, int64_t head, const Own& keys, const Own& values, Space& space) const {
    const int64_t share = of.heads / of.kv_heads, dim = of.dim;
    const int64_t last = at.column - at.padding[row], wide = padded(last + 1);
    const int64_t common = (at.shared - at.padding[row]) / kLanes * kLanes;
    space.q.resize(share * dim / 2);
    space.weights.resize(share * wide / 2);
    space.scores.resize(share * wide);
    space.sums.resize(share * dim);
    bf16 turned[kMostDims];
    put_key(turn(of.key.at(row, head), row, turned), last, dim, keys.own);
    put_value(of.value.at(row, head), last, dim, values.own);
    for (int64_t h = 0; h < share; ++h) {
      const bf16* from = turn(of.query.at(row, head * share + h), row, turned);
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
      bf16* to = of.out.at(row, head * share + h);
      for (int64_t d = 0; d < dim; d += kLanes) store(to + d, load(&space.sums[h * dim + d]));
    }
  }

 private:
  // Scores of the columns [first, end), whole blocks.
  void score(const uint32_t* keys, int64_t first, int64_t end, int64_t wide, Space& space) const {
    const int64_t share = of.heads / of.kv_heads, dim = of.dim;
    product(share, end - first, dim / 2, space.q.data(), dim / 2, 1,
            {keys + first * dim / 2, kLanes, dim / 2 * kLanes}, &space.scores[first], wide,
            Into::kFresh);
  }

  // Values of the columns [first, end), an even number, times their weights.
  void weigh(const uint32_t* values, int64_t first, int64_t end, int64_t wide, Into into,
             Space& space) const {
    const int64_t share = of.heads / of.kv_heads, dim = of.dim;
    product(share, dim, (end - first) / 2, space.weights.data() + first / 2, wide / 2, 1,
            {values + first * dim / 2, dim}, space.sums.data(), dim, into);
  }

  const bf16* turn(const bf16* from, int64_t row, bf16* turned) const {
    if (cos == nullptr) return from;
    rotate(from, cos + row * of.dim, sin + row * of.dim, turned, of.dim, false);
    return turned;
  }
};

// Asks for the own columns of a row and head, which stand too far apart for the hardware to guess.
void prefetch(const uint32_t* columns, const Columns& at, int64_t row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(uint32_t);
  const int64_t first = (at.shared - at.padding[row]) / kLanes * kLanes;
  const int64_t end = padded(at.column - at.padding[row] + 1);
  for (const uint32_t* p = columns + first * dim / 2; p < columns + end * dim / 2; p += kLine)
    __builtin_prefetch(p);
}

}  // namespace

Columns columns_of(const at::Tensor& cache, const at::Tensor& table, at::IntArrayRef place) {
  TORCH_CHECK(table.size(0) == 2 && table.is_contiguous(), "rows want padding and leaders");
  TORCH_CHECK(cache.is_contiguous() && cache.size(3) % kLanes == 0, "columns want whole blocks");
  TORCH_CHECK(place[1] < cache.size(3), "the cache is full");
  const int64_t* rows = data<int64_t>(table);
  return {place[1], place[0], cache.size(3), rows, rows + table.size(1)};
}

Attention attention_of(const Heads& of, const bf16* cos, const bf16* sin, const Columns& at,
                       at::Tensor& cache, int64_t layer, double scaling) {
  TORCH_CHECK(of.dim <= kMostDims && of.dim % kLanes == 0, "head dims of another size");
  const auto part = [&](int64_t i) {
    return reinterpret_cast<uint32_t*>(data_out<bf16>(cache) + i * cache.stride(0));
  };
  return {of, cos, sin, at, part(layer), part(cache.size(0) / 2 + layer),
          static_cast<float>(scaling)};
}

void Attention::run(int64_t begin, int64_t end) const {
  static thread_local Step::Space space;
  const Step step{*this};
  const int64_t stride = at.capacity * of.dim / 2;  // from one row and head to the next
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / of.kv_heads, head = task % of.kv_heads;
    if (task + 1 < end) {
      prefetch(keys + (task + 1) * stride, at, (task + 1) / of.kv_heads, of.dim);
      prefetch(values + (task + 1) * stride, at, (task + 1) / of.kv_heads, of.dim);
    }
    const int64_t leader = (at.leaders[row] * of.kv_heads + head) * stride;
    step.run(row, head, {keys + task * stride, keys + leader},
             {values + task * stride, values + leader}, space);
  }
}

// One layer's decode attention, [B, H, D]. Queries [B, H, D], key and value [B, H_kv, D].
at::Tensor decode_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            at::Tensor& cache, int64_t layer, const at::Tensor& table,
                            at::IntArrayRef place, double scaling) {
  TORCH_CHECK(query.scalar_type() == at::kBFloat16, "decode attention takes bfloat16");
  at::Tensor out = at::empty({query.size(0), query.size(1), query.size(2)}, query.options());
  const Heads of{Packed<bf16>(query), Packed<bf16>(key), Packed<bf16>(value), Packed<bf16>(out),
                 query.size(0), query.size(1), key.size(1), query.size(2)};
  const Columns at = columns_of(cache, table, place);
  const Attention attention = attention_of(of, nullptr, nullptr, at, cache, layer, scaling);
  at::parallel_for(0, attention.tasks(), 1,
                   [&](int64_t begin, int64_t end) { attention.run(begin, end); });
  return out;
}

TORCH_LIBRARY_FRAGMENT(rlprompt_cpu, m) {
  m.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) cache, int layer, "
      "Tensor table, int[] place, float scaling) -> Tensor",
      &decode_attention);
}

}  // namespace rlprompt

// The product of a few rows with a frozen weight: what a decode step is made of.
//
// It reads weights where oneDNN has packed them (format AB16b64a2b: blocks of 64 outputs, in them
// pairs of inputs, 64 x 2 numbers a pair) and sums in oneDNN's order: pairs of inputs one after
// another, in chunks of `chunk` inputs that are added up at the end. So its bits are those of the
// product that training uses, and no weight is held twice. oneDNN waits for memory when rows are
// few; here the block after the next is asked for while this one is multiplied.

#include "product.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

namespace rlprompt {
namespace {

constexpr int64_t kBlock = 64;           // outputs of a block of the packed weight
constexpr int64_t kUnit = 32;            // outputs that are computed together, half a block
constexpr int64_t kPair = 2 * kBlock;    // numbers of one pair of inputs in a block

#ifdef RLPROMPT_BF16_PRODUCTS

constexpr int kVectors = kUnit / kLanes;

// Which part of the next unit's weights a pass over the rows asks for: every `step`th pair.
struct Ahead {
  const uint16_t* weights;
  int64_t step, phase;
};

// MR rows times one unit over the pairs [first, last): sums (+)= x w.
template <int MR>
inline void sum_pairs(int64_t first, int64_t last, const uint32_t* x, int64_t row,
                      const uint16_t* weights, const Ahead& ahead, float* sums, bool add) {
  __m512 acc[MR][kVectors];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_setzero_ps();
  for (int64_t p = first; p < last; ++p) {
    if ((p & (ahead.step - 1)) == ahead.phase) {
      const auto* next = reinterpret_cast<const char*>(ahead.weights + p * kPair);
      _mm_prefetch(next, _MM_HINT_T1);
      _mm_prefetch(next + 64, _MM_HINT_T1);
    }
    __m512bh w[kVectors];
    for (int j = 0; j < kVectors; ++j)
      w[j] = (__m512bh)_mm512_loadu_si512(weights + p * kPair + j * 2 * kLanes);
    for (int i = 0; i < MR; ++i) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[i * row + p]));
      for (int j = 0; j < kVectors; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], pair, w[j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < kVectors; ++j) {
      float* to = sums + i * kUnit + j * kLanes;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), acc[i][j]) : acc[i][j]);
    }
}

struct Product : PackedProduct {
  // MR rows from `row` on, of one unit of outputs.
  template <int MR>
  void run(int64_t row, int64_t unit, const uint16_t* unit_weights, const Ahead& ahead) const {
    alignas(64) float sums[MR * kUnit];
    const auto* pairs = reinterpret_cast<const uint32_t*>(x + row * inputs);
    for (int64_t first = 0; first < inputs; first += chunk)
      sum_pairs<MR>(first / 2, std::min(first + chunk, inputs) / 2, pairs, inputs / 2,
                    unit_weights, ahead, sums, first > 0);
    bf16* to = out + row * outputs + unit * kUnit;
    for (int i = 0; i < MR; ++i)
      for (int64_t j = 0; j < kUnit; j += kLanes) {
        const vec sum = load(sums + i * kUnit + j);
        store(to + i * outputs + j, bias == nullptr ? sum : sum + load(bias + unit * kUnit + j));
      }
    if (addition.inner != nullptr) addition.add<MR>(row, unit * kUnit, kUnit, to, outputs);
  }

  // All rows of one unit.
  void run_unit(int64_t unit) const {
    const uint16_t* mine = at_unit(unit);
    if (addition.inner != nullptr)
      for (int64_t j = unit * kUnit; j < (unit + 1) * kUnit; j += kLanes) addition.prefetch(j);
    const int64_t passes = (rows + 7) / 8;
    Ahead ahead{unit + 1 < outputs / kUnit ? at_unit(unit + 1) : mine,
                passes >= 4 ? 4 : passes >= 2 ? 2 : 1, 0};
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) {
      run<8>(row, unit, mine, ahead);
      ahead.phase = (ahead.phase + 1) & (ahead.step - 1);
    }
    if (row + 4 <= rows) run<4>(row, unit, mine, ahead), row += 4;
    if (row + 2 <= rows) run<2>(row, unit, mine, ahead), row += 2;
    if (row < rows) run<1>(row, unit, mine, ahead);
  }

 private:
  const uint16_t* at_unit(int64_t unit) const {
    const int64_t block = unit * kUnit / kBlock, half = unit % (kBlock / kUnit);
    return &weights[block * kBlock * inputs + half * 2 * kUnit].bits;
  }
};

#endif

const bf16* packed_data(const at::Tensor& weight) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::data_ptr", "");
  torch::jit::Stack stack{weight};
  op.callBoxed(stack);
  return reinterpret_cast<const bf16*>(stack[0].toInt());
}

}  // namespace

int64_t PackedProduct::units() const { return outputs / kUnit; }

void PackedProduct::run(int64_t begin, int64_t end) const {
#ifdef RLPROMPT_BF16_PRODUCTS
  const Product product{*this};
  for (int64_t unit = begin; unit < end; ++unit) {
    soon.prefetch(unit - begin, end - begin);
    product.run_unit(unit);
  }
#endif
}

PackedProduct packed_product_of(const bf16* x, int64_t rows, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, int64_t chunk, bf16* out) {
#ifdef RLPROMPT_BF16_PRODUCTS
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  TORCH_CHECK(outputs % kBlock == 0 && inputs % 32 == 0 && chunk >= 2 && chunk % 2 == 0,
              "a weight of another shape");
  return {x, packed_data(weight), bias ? data<bf16>(*bias) : nullptr, out, rows, inputs, outputs,
          chunk};
#else
  TORCH_CHECK(false, "this processor has no bfloat16 products");
#endif
}

at::Tensor packed_product(const at::Tensor& x, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias, int64_t chunk) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == weight.size(1) && x.is_contiguous(),
              "rows want [B, K], dense");
  at::Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  const PackedProduct product =
      packed_product_of(data<bf16>(x), x.size(0), weight, bias, chunk, data_out<bf16>(out));
  at::parallel_for(0, product.units(), 1,
                   [&](int64_t begin, int64_t end) { product.run(begin, end); });
  return out;
}

// Whether this processor has the instruction that the product is made of.
bool has_packed_product() {
#ifdef RLPROMPT_BF16_PRODUCTS
  return true;
#else
  return false;
#endif
}

TORCH_LIBRARY_FRAGMENT(rlprompt_cpu, m) {
  m.def("packed_product(Tensor x, Tensor weight, Tensor? bias, int chunk) -> Tensor",
        &packed_product);
  m.def("has_packed_product() -> bool", &has_packed_product);
}

}  // namespace rlprompt

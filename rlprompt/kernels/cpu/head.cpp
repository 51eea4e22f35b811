// Rows of logits: log-probability, entropy and their gradients for training, and drawing a token.
//
// Arithmetic is in float32 as on the plain path; long sums are in float64 over blocks of float32.

#include "common.h"

#include <ATen/ops/empty.h>

#include <limits>

namespace rlprompt {
namespace {

constexpr int64_t kBlock = 256;  // tokens whose weights are summed in float32

template <typename T>
float highest(const T* row, int64_t vocab) {
  float top = -std::numeric_limits<float>::infinity();
  vec tops = vec{} + top;
  int64_t v = 0;
  for (; v + kLanes <= vocab; v += kLanes) tops = larger(tops, load(row + v));
  top = most_across(tops);
  for (; v < vocab; ++v) top = std::max(top, widen(row[v]));
  return top;
}

// sum exp(z) and sum exp(z) z over a row, z = l * inverse - top; `weights` [vocab] gets exp(z).
template <typename T>
void weigh(const T* row, int64_t vocab, float inverse, float top, double* total, double* mean,
           float* weights) {
  *total = *mean = 0.0;
  for (int64_t v = 0; v < vocab; v += kBlock) {
    const int64_t n = std::min(kBlock, vocab - v);
    vec sums = {}, weighted = {};
    sweep(n, [&](int64_t i, auto lanes) {
      const vec logit = load(row + v + i, lanes) * inverse - top;
      const vec weight = only(exponential(logit), lanes);
      store(weights + v + i, weight, lanes);
      sums += weight;
      weighted += weight * logit;
    });
    *total += sum_across(sums);
    *mean += sum_across(weighted);
  }
}

}  // namespace

// Scores of `targets` under softmax(logits / temperature), and the gradients of the scaled logits.
//
// logits [M, V] become d log p(target) / d (logits / temperature) in place where `grad`;
// `spread` [M, V] or [0] gets d entropy / d (logits / temperature).
// Returns log-probabilities and entropies, float32 [2, M].
at::Tensor head_scores_(at::Tensor& logits, const at::Tensor& targets, double temperature,
                        bool grad, at::Tensor& spread) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  at::Tensor out = at::empty({2, rows}, logits.options().dtype(at::kFloat));
  float* scores = data_out<float>(out);
  const int64_t* target = data<int64_t>(targets);
  const float inverse = static_cast<float>(1.0 / temperature);
  const bool spreads = grad && spread.numel() > 0;
  by_type(logits, [&](auto type) {
    using T = decltype(type);
    T* values = data_out<T>(logits);
    T* spread_to = spreads ? data_out<T>(spread) : nullptr;
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> weights(vocab);  // of one row: stays in the cache until it is read again
      for (int64_t r = begin; r < end; ++r) {
        T* row = values + r * vocab;
        const float top = highest(row, vocab) * inverse;
        double total, mean;
        weigh(row, vocab, inverse, top, &total, &mean, weights.data());
        const float log_total = static_cast<float>(std::log(total));
        const float entropy = static_cast<float>(std::log(total) - mean / total);
        const float chosen = widen(row[target[r]]) * inverse;
        scores[r] = chosen - (top + log_total);
        scores[rows + r] = entropy;
        if (!grad) continue;
        const float share = static_cast<float>(1.0 / total);
        if (spreads) {
          T* to = spread_to + r * vocab;
          sweep(vocab, [&](int64_t v, auto lanes) {
            const vec logit = load(row + v, lanes) * inverse - top;
            const vec p = load(&weights[v], lanes) * share;
            store(to + v, -p * (logit - log_total + entropy), lanes);
            store(row + v, -p, lanes);
          });
        } else {
          sweep(vocab, [&](int64_t v, auto lanes) {
            store(row + v, load(&weights[v], lanes) * -share, lanes);
          });
        }
        const float p = static_cast<float>(std::exp(static_cast<double>(scores[r])));
        row[target[r]] = narrow<T>(1.0f - p);
      }
    });
  });
  return out;
}

namespace {

// Draws by inverting the cumulative weight over blocks and then inside one block.
template <typename T>
class Drawer {
 public:
  Drawer(const T* row, int64_t vocab, float inverse, const int64_t* banned, int64_t num_banned)
      : row_(row), vocab_(vocab), inverse_(inverse), banned_(banned), num_banned_(num_banned) {}

  // Sums of the blocks' weights relative to `top`, in `sums`.
  double weigh_blocks(float top, std::vector<double>& sums, bool without_banned) const {
    double total = 0.0;
    for (int64_t b = 0; b < static_cast<int64_t>(sums.size()); ++b) {
      const T* from = row_ + b * kBlock;
      const int64_t n = std::min(kBlock, vocab_ - b * kBlock);
      vec block = {};
      sweep(n, [&](int64_t i, auto lanes) {
        block += only(exponential(load(from + i, lanes) * inverse_ - top), lanes);
      });
      sums[b] = sum_across(block);
    }
    if (without_banned) return leave_out_banned(top, sums);
    for (double sum : sums) total += sum;
    return total;
  }

  // Sums the blocks of banned tokens again, without them; returns the new total.
  double leave_out_banned(float top, std::vector<double>& sums) const {
    for (int64_t k = 0; k < num_banned_; ++k) {
      const int64_t b = banned_[k] / kBlock;
      double sum = 0.0;
      for (int64_t v = b * kBlock; v < std::min((b + 1) * kBlock, vocab_); ++v)
        sum += weight(v, top, true);
      sums[b] = sum;
    }
    double total = 0.0;
    for (double sum : sums) total += sum;
    return total;
  }

  float weight(int64_t v, float top, bool without_banned) const {
    if (without_banned && std::find(banned_, banned_ + num_banned_, v) != banned_ + num_banned_)
      return 0.0f;
    return exponential(widen(row_[v]) * inverse_ - top);
  }

  float highest_allowed() const {
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t v = 0; v < vocab_; ++v)
      if (std::find(banned_, banned_ + num_banned_, v) == banned_ + num_banned_)
        top = std::max(top, widen(row_[v]));
    return top * inverse_;
  }

  // The token at which the cumulative weight passes goal; the last possible one if rounding
  // points behind it.
  int64_t token_at(double goal, float top, const std::vector<double>& sums) const {
    int64_t block = 0, last_possible = 0;
    double before = 0.0;
    const int64_t blocks = static_cast<int64_t>(sums.size());
    for (int64_t b = 0; b < blocks; ++b) {
      if (sums[b] <= 0.0) continue;
      last_possible = block = b;
      if (before + sums[b] > goal) break;
      before += sums[b];
    }
    block = last_possible;
    int64_t token = block * kBlock;
    double inside = before;
    for (int64_t v = block * kBlock; v < std::min((block + 1) * kBlock, vocab_); ++v) {
      const float w = weight(v, top, num_banned_ > 0);
      if (w <= 0.0f) continue;
      token = v;
      inside += w;
      if (inside > goal) break;
    }
    return token;
  }

 private:
  const T* row_;
  int64_t vocab_;
  float inverse_;
  const int64_t* banned_;
  int64_t num_banned_;
};

}  // namespace

// One token per row of logits [B, V] by uniform numbers float64 [B] in [0, 1).
//
// Returns token ids int64 [B] and float32 [B] log-probabilities under softmax(logits / temperature)
// with the `banned` tokens (which are never drawn) counted in.
std::tuple<at::Tensor, at::Tensor> draw(const at::Tensor& logits, const at::Tensor& uniform,
                                        double temperature, const at::Tensor& banned) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  at::Tensor tokens = at::empty({rows}, logits.options().dtype(at::kLong));
  at::Tensor logprobs = at::empty({rows}, logits.options().dtype(at::kFloat));
  int64_t* token_to = data_out<int64_t>(tokens);
  float* logprob_to = data_out<float>(logprobs);
  const double* u = data<double>(uniform);
  const int64_t* never = data<int64_t>(banned);
  const int64_t num_banned = banned.numel();
  const float inverse = static_cast<float>(1.0 / temperature);
  by_type(logits, [&](auto type) {
    using T = decltype(type);
    const T* values = data<T>(logits);
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> sums((vocab + kBlock - 1) / kBlock);
      for (int64_t r = begin; r < end; ++r) {
        const T* row = values + r * vocab;
        const Drawer<T> drawer(row, vocab, inverse, never, num_banned);
        const float top = highest(row, vocab) * inverse;
        const double total = drawer.weigh_blocks(top, sums, false);
        float relative_to = top;
        double allowed = total;
        if (num_banned > 0) {
          allowed = drawer.leave_out_banned(top, sums);
          if (allowed < 1e-6 * total) {
            // The banned tokens have all the mass: weigh the others by the highest of them.
            relative_to = drawer.highest_allowed();
            allowed = drawer.weigh_blocks(relative_to, sums, true);
          }
        }
        const int64_t token = drawer.token_at(u[r] * allowed, relative_to, sums);
        token_to[r] = token;
        logprob_to[r] = widen(row[token]) * inverse - top - static_cast<float>(std::log(total));
      }
    });
  });
  return {tokens, logprobs};
}

TORCH_LIBRARY_FRAGMENT(rlprompt_cpu, m) {
  m.def(
      "head_scores_(Tensor(a!) logits, Tensor targets, float temperature, bool grad, "
      "Tensor(b!) spread) -> Tensor",
      &head_scores_);
  m.def("draw(Tensor logits, Tensor uniform, float temperature, Tensor banned) -> (Tensor, Tensor)",
        &draw);
}

}  // namespace rlprompt

// Attention of packed tokens in a tree: [shared prefix | the group's query | own causal keys].
//
// Keys are read where they stand, once per row and key/value head, into a small block of pairs
// (see pairs.h); nothing is repeated, padded or concatenated in memory. The backward computes the
// scores again. All operands are bfloat16 and all sums float32, in both directions.
//
// Letters: N packed tokens, H heads, H_kv key/value heads, share = H / H_kv, D head dim, P prefix
// tokens, S keys that a row sees. A span is a run of tokens that see each other causally: a query
// (no parent), or a completion whose parent is its query.

#include "pairs.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace rlprompt {
namespace {

constexpr int64_t kSpansPerTask = 4;  // completions of one group that share an account of gradients

struct Span {
  int64_t start, length, parent, parent_length;
};

std::vector<Span> read_spans(const at::Tensor& table) {
  const int64_t* n = data<int64_t>(table);
  std::vector<Span> spans;
  for (int64_t i = 0; i < table.size(0); ++i, n += 4)
    if (n[1] > 0) spans.push_back({n[0], n[1], n[2], n[3]});
  return spans;
}

// Shapes of one call.
struct Sizes {
  int64_t heads, kv_heads, share, dim, prefix, tile;
  float scaling;
  Sizes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& prefix_keys, double scale)
      : heads(q.size(1)),
        kv_heads(k.size(1)),
        share(heads / kv_heads),
        dim(q.size(2)),
        prefix(prefix_keys.size(1)),
        tile(std::max<int64_t>(8, 48 / share)),
        scaling(static_cast<float>(scale)) {
    TORCH_CHECK(q.scalar_type() == at::kBFloat16, "tree attention takes bfloat16");
    TORCH_CHECK(dim % kLanes == 0, "head dims of another size");
  }
};

// Runs `body(task)` for every task, each on the first thread that is free.
template <typename F>
void for_each_task(int64_t tasks, const F& make_body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      auto body = make_body();
      for (int64_t task = next++; task < tasks; task = next++) body(task);
    }
  });
}

// The keys (or values) that one span sees with one key/value head, in pairs.
struct Block {
  Pairs columns, rows;  // [D / 2, width] along their dims; [width / 2, D] along themselves
  int64_t width = 0;

  void read(const bf16* prefix, const Packed<bf16>& own, const Span& span, int64_t head,
            const Sizes& z, bool want_columns, bool want_rows) {
    const int64_t shared = z.prefix + span.parent_length, seen = shared + span.length;
    width = padded(seen);
    const auto row = [&](int64_t s) -> const bf16* {
      return s < z.prefix ? prefix + (head * z.prefix + s) * z.dim
             : s < shared ? own.at(span.parent + s - z.prefix, head)
                          : own.at(span.start + s - shared, head);
    };
    if (want_columns) {
      columns.resize(z.dim / 2 * width);
      write_columns(row, seen, z.dim, columns.data(), width);
    }
    if (want_rows) {
      rows.resize(width / 2 * z.dim);
      write_row_pairs(row, seen, z.dim, rows.data());
    }
  }
};

// Rows of bfloat16 numbers that are multiplied in pairs along the rows or along their numbers.
// Behind an odd number of rows stands one of zeros.
struct Rows {
  Pairs numbers;  // [rows, width], two bfloat16 numbers in each
  int64_t width = 0;

  void resize(int64_t rows, int64_t row_width) {
    width = row_width;
    numbers.resize((rows + 1) * width / 2);
    if (rows % 2) std::fill_n(numbers.begin() + rows * width / 2, width / 2, 0u);
  }
  bf16* at(int64_t row) { return reinterpret_cast<bf16*>(&numbers[row * width / 2]); }

  // Pairs of rows, [rows / 2, width].
  void pair_up(int64_t rows, Pairs& out) {
    out.resize((rows + 1) / 2 * width);
    for (int64_t r = 0; r < rows; r += 2) interleave(at(r), at(r + 1), width, &out[r / 2 * width]);
  }
};

// Queries and weights of one tile: rows are (head of the share, token of the tile).
struct Tile {
  Rows q, weights;
  std::vector<float> scores, out;
  int64_t rows = 0, tokens = 0, wide = 0;

  // Softmax weights of tokens [first, last) of a span, rounded as the plain path rounds them.
  void weigh(const Packed<bf16>& query, const Span& span, int64_t first, int64_t last,
             int64_t kv_head, const Block& keys, const Sizes& z) {
    const int64_t shared = z.prefix + span.parent_length;
    tokens = last - first;
    rows = z.share * tokens;
    wide = padded(shared + last);
    q.resize(rows, z.dim);
    weights.resize(rows, wide);
    scores.resize(rows * wide);
    out.resize(rows * z.dim);
    each(span, first, kv_head, z, [&](int64_t r, int64_t token, int64_t head) {
      const bf16* from = query.at(token, head);
      for (int64_t d = 0; d < z.dim; d += kLanes) store(q.at(r) + d, load(from + d) * z.scaling);
    });
    product(rows, wide, z.dim / 2, q.numbers.data(), z.dim / 2, 1,
            {keys.columns.data(), keys.width}, scores.data(), wide, Into::kFresh);
    each(span, first, kv_head, z, [&](int64_t r, int64_t token, int64_t) {
      softmax(&scores[r * wide], weights.at(r), shared + token - span.start + 1, wide);
    });
  }

  // Calls body(row, packed token, head) for every row.
  template <typename F>
  void each(const Span& span, int64_t first, int64_t kv_head, const Sizes& z, const F& body) const {
    for (int64_t h = 0, r = 0; h < z.share; ++h)
      for (int64_t t = 0; t < tokens; ++t, ++r)
        body(r, span.start + first + t, kv_head * z.share + h);
  }

  // weights times rows of pairs [wide / 2, D], times `factor`, to the places of the queries.
  void write(const Rows& by, const Pairs& from, const Packed<bf16>& to, const Span& span,
             int64_t first, int64_t kv_head, const Sizes& z, float factor) {
    product(rows, z.dim, wide / 2, by.numbers.data(), wide / 2, 1, {from.data(), z.dim}, out.data(),
            z.dim, Into::kFresh);
    each(span, first, kv_head, z, [&](int64_t r, int64_t token, int64_t head) {
      bf16* place = to.at(token, head);
      for (int64_t d = 0; d < z.dim; d += kLanes)
        store(place + d, load(&out[r * z.dim + d]) * factor);
    });
  }
};

void forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
             const at::Tensor& prefix_keys, const at::Tensor& prefix_values,
             const std::vector<Span>& spans, const Sizes& z, at::Tensor& out) {
  const Packed<bf16> query(q), key(k), value(v), to(out);
  const bf16 *pk = data<bf16>(prefix_keys), *pv = data<bf16>(prefix_values);
  for_each_task(spans.size() * z.kv_heads, [&] {
    return [&, keys = Block(), values = Block(), tile = Tile()](int64_t task) mutable {
      const Span& span = spans[task / z.kv_heads];
      const int64_t head = task % z.kv_heads;
      keys.read(pk, key, span, head, z, true, false);
      values.read(pv, value, span, head, z, false, true);
      for (int64_t first = 0; first < span.length; first += z.tile) {
        const int64_t last = std::min(first + z.tile, span.length);
        tile.weigh(query, span, first, last, head, keys, z);
        tile.write(tile.weights, values.rows, to, span, first, head, z, 1.0f);
      }
    };
  });
}

// What the spans of one task add to keys and values that they share: the prefix and one query.
struct Account {
  int64_t first_span, num_spans, kv_head, query, query_length;
  bool root;  // the query itself
  std::vector<float> keys, values;  // [P + Q, D], then room for a span's own keys
};

std::vector<Account> accounts_of(const std::vector<Span>& spans, const Sizes& z) {
  std::vector<Account> out;
  const int64_t count = spans.size();
  for (int64_t i = 0; i < count;) {
    int64_t n = 1;
    const Span& s = spans[i];
    if (s.parent_length > 0)
      while (i + n < count && n < kSpansPerTask && spans[i + n].parent == s.parent &&
             spans[i + n].parent_length == s.parent_length)
        ++n;
    const bool root = s.parent_length == 0;
    for (int64_t h = 0; h < z.kv_heads; ++h)
      out.push_back({i, n, h, root ? s.start : s.parent, root ? s.length : s.parent_length,
                     root, {}, {}});
    i += n;
  }
  return out;
}

class Backward {
 public:
  Backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
           const at::Tensor& prefix_keys, const at::Tensor& prefix_values,
           const std::vector<Span>& spans, const Sizes& sizes, at::Tensor& dq, at::Tensor& dk,
           at::Tensor& dv)
      : spans_(spans), z_(sizes), grad_(grad), query_(q), key_(k), value_(v), dq_(dq), dk_(dk),
        dv_(dv), prefix_keys_(data<bf16>(prefix_keys)), prefix_values_(data<bf16>(prefix_values)) {}

  // All spans of one account; what they share is left in the account.
  void run(Account& account) {
    const Span& first = spans_[account.first_span];
    const bool root = first.parent_length == 0;
    const int64_t shared = z_.prefix + first.parent_length;
    int64_t longest = 0;
    for (int64_t i = 0; i < account.num_spans; ++i)
      longest = std::max(longest, spans_[account.first_span + i].length);
    account.keys.assign((shared + longest) * z_.dim, 0.0f);
    account.values.assign((shared + longest) * z_.dim, 0.0f);
    for (int64_t i = 0; i < account.num_spans; ++i) {
      const Span& span = spans_[account.first_span + i];
      run_span(span, account);
      if (root) break;  // its own keys are what its completions share
      take(account.keys, shared, span, account.kv_head, dk_);
      take(account.values, shared, span, account.kv_head, dv_);
    }
    account.keys.resize((z_.prefix + account.query_length) * z_.dim);
    account.values.resize((z_.prefix + account.query_length) * z_.dim);
  }

 private:
  void run_span(const Span& span, Account& account) {
    const int64_t head = account.kv_head, dim = z_.dim, shared = z_.prefix + span.parent_length;
    keys_.read(prefix_keys_, key_, span, head, z_, true, true);
    values_.read(prefix_values_, value_, span, head, z_, true, false);
    for (int64_t first = 0; first < span.length; first += z_.tile) {
      const int64_t last = std::min(first + z_.tile, span.length);
      tile_.weigh(query_, span, first, last, head, keys_, z_);
      const int64_t rows = tile_.rows, wide = tile_.wide, pairs = (rows + 1) / 2;
      up_.resize(rows, dim);
      tile_.each(span, first, head, z_, [&](int64_t r, int64_t token, int64_t of) {
        const bf16* from = grad_.at(token, of);
        for (int64_t d = 0; d < dim; d += kLanes) store(up_.at(r) + d, load(from + d));
      });
      float* scores = tile_.scores.data();
      product(rows, wide, dim / 2, up_.numbers.data(), dim / 2, 1,
              {values_.columns.data(), values_.width}, scores, wide, Into::kFresh);
      d_scores_.resize(rows, wide);
      for (int64_t r = 0; r < rows; ++r)
        through_softmax(tile_.weights.at(r), scores + r * wide, d_scores_.at(r), wide);
      tile_.write(d_scores_, keys_.rows, dq_, span, first, head, z_, z_.scaling);
      tile_.weights.pair_up(rows, left_);
      up_.pair_up(rows, right_);
      product(shared + last, dim, pairs, left_.data(), 1, wide, {right_.data(), dim},
              account.values.data(), dim, Into::kAdd);
      d_scores_.pair_up(rows, left_);
      tile_.q.pair_up(rows, right_);
      product(shared + last, dim, pairs, left_.data(), 1, wide, {right_.data(), dim},
              account.keys.data(), dim, Into::kAdd);
    }
  }

  // Gradients of the weights become gradients of the scores.
  static void through_softmax(const bf16* weights, float* grads, bf16* out, int64_t wide) {
    vec dots = {};
    for (int64_t s = 0; s < wide; s += kLanes) {
      const vec grad = rounded<bf16>(load(grads + s));
      store(grads + s, grad);
      dots += load(weights + s) * grad;
    }
    const float dot = sum_across(dots);
    for (int64_t s = 0; s < wide; s += kLanes)
      store(out + s, load(weights + s) * (load(grads + s) - dot));
  }

  // A completion's own rows leave the account and are zero again for the next one.
  void take(std::vector<float>& rows, int64_t shared, const Span& span, int64_t head,
            const Packed<bf16>& to) const {
    for (int64_t s = 0; s < span.length; ++s) {
      float* from = &rows[(shared + s) * z_.dim];
      bf16* place = to.at(span.start + s, head);
      for (int64_t d = 0; d < z_.dim; d += kLanes) store(place + d, load(from + d));
      std::fill(from, from + z_.dim, 0.0f);
    }
  }

  const std::vector<Span>& spans_;
  const Sizes& z_;
  Packed<bf16> grad_, query_, key_, value_, dq_, dk_, dv_;
  const bf16 *prefix_keys_, *prefix_values_;
  Block keys_, values_;
  Tile tile_;
  Rows up_, d_scores_;
  Pairs left_, right_;  // pairs of a tile's rows
};

// Sums the accounts in their order: into the prefix's gradients [H_kv, P, D] and the queries'.
void settle(const std::vector<Account>& accounts, const Sizes& z, float* prefix_keys,
            float* prefix_values, const Packed<bf16>& dk, const Packed<bf16>& dv) {
  at::parallel_for(0, z.kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums[2];
    for (int64_t head = begin; head < end; ++head) {
      for (const Account& a : accounts) {
        if (a.kv_head != head) continue;
        for (int64_t i = 0; i < z.prefix * z.dim; ++i) {
          prefix_keys[head * z.prefix * z.dim + i] += a.keys[i];
          prefix_values[head * z.prefix * z.dim + i] += a.values[i];
        }
      }
      for (const Account& root : accounts) {
        if (root.kv_head != head || !root.root) continue;
        const int64_t numbers = root.query_length * z.dim, skip = z.prefix * z.dim;
        for (auto& sum : sums) sum.assign(numbers, 0.0f);
        for (const Account& a : accounts) {
          if (a.kv_head != head || a.query != root.query) continue;
          for (int64_t i = 0; i < numbers; ++i) {
            sums[0][i] += a.keys[skip + i];
            sums[1][i] += a.values[skip + i];
          }
        }
        for (int64_t s = 0; s < root.query_length; ++s)
          for (int64_t d = 0; d < z.dim; ++d) {
            dk.at(root.query + s, head)[d] = narrow<bf16>(sums[0][s * z.dim + d]);
            dv.at(root.query + s, head)[d] = narrow<bf16>(sums[1][s * z.dim + d]);
          }
      }
    }
  });
}

}  // namespace

// Attention output [N, H, D]. q [N, H, D], k and v [N, H_kv, D]; prefixes [H_kv, P, D], dense;
// spans int64 [R, 4]: first token, tokens, first token and tokens of the parent (0 = none).
at::Tensor tree_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& prefix_keys, const at::Tensor& prefix_values,
                          const at::Tensor& spans, double scaling) {
  at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2)}, q.options());
  const Sizes sizes(q, k, prefix_keys, scaling);
  const auto table = read_spans(spans);
  forward(q, k, v, prefix_keys, prefix_values, table, sizes, out);
  return out;
}

// Gradients of q, k, v (in their type) and of both prefixes (float32).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> tree_attention_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& prefix_keys, const at::Tensor& prefix_values, const at::Tensor& spans,
    double scaling) {
  const Sizes z(q, k, prefix_keys, scaling);
  const int64_t tokens = q.size(0);
  at::Tensor dq = at::empty({tokens, z.heads, z.dim}, q.options());
  at::Tensor dk = at::empty({tokens, z.kv_heads, z.dim}, q.options());
  at::Tensor dv = at::empty({tokens, z.kv_heads, z.dim}, q.options());
  const auto wide = q.options().dtype(at::kFloat);
  at::Tensor d_prefix_keys = at::zeros({z.kv_heads, z.prefix, z.dim}, wide);
  at::Tensor d_prefix_values = at::zeros({z.kv_heads, z.prefix, z.dim}, wide);
  const auto table = read_spans(spans);
  auto accounts = accounts_of(table, z);
  for_each_task(accounts.size(), [&] {
    return [&, work = Backward(grad, q, k, v, prefix_keys, prefix_values, table, z, dq, dk,
                               dv)](int64_t task) mutable { work.run(accounts[task]); };
  });
  settle(accounts, z, data_out<float>(d_prefix_keys), data_out<float>(d_prefix_values),
         Packed<bf16>(dk), Packed<bf16>(dv));
  return {dq, dk, dv, d_prefix_keys, d_prefix_values};
}

TORCH_LIBRARY_FRAGMENT(rlprompt_cpu, m) {
  m.def(
      "tree_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_keys, Tensor prefix_values, "
      "Tensor spans, float scaling) -> Tensor",
      &tree_attention);
  m.def(
      "tree_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor prefix_keys, "
      "Tensor prefix_values, Tensor spans, float scaling) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)",
      &tree_attention_backward);
}

}  // namespace rlprompt

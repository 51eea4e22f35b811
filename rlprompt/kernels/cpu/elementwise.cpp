// RMS norm, rotary embedding and the gated activation, forward and backward, each in one pass.
//
// Every operation of the plain path rounds its result to the tensor's type; so do these, in the
// same places, and nothing but the order of sums differs.

#include "elementwise.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace rlprompt {
namespace {

constexpr int64_t kGrain = 8;  // rows per task at least

template <typename T>
float mean_square(const T* x, int64_t width) {
  vec sums = {};
  sweep(width, [&](int64_t i, auto lanes) {
    const vec value = load(x + i, lanes);
    sums += value * value;
  });
  return sum_across(sums) / static_cast<float>(width);
}

template <typename T>
void norm_row(const T* x, const T* weight, T* out, int64_t width, float eps) {
  const float scale = 1.0f / std::sqrt(mean_square(x, width) + eps);
  sweep(width, [&](int64_t i, auto lanes) {
    store(out + i, load(weight + i, lanes) * rounded<T>(load(x + i, lanes) * scale), lanes);
  });
}

// The gradient of norm_row's input, plus a row `beside` it (null = nothing).
template <typename T>
void norm_row_backward(const T* grad, const T* x, const T* weight, const T* beside, T* out,
                       int64_t width, float eps) {
  const float scale = 1.0f / std::sqrt(mean_square(x, width) + eps);
  const auto through = [&](int64_t i, auto lanes) {
    return rounded<T>(load(grad + i, lanes) * load(weight + i, lanes));
  };
  vec dots = {};
  sweep(width, [&](int64_t i, auto lanes) { dots += through(i, lanes) * load(x + i, lanes); });
  const float pull = sum_across(dots) * scale * scale * scale / static_cast<float>(width);
  sweep(width, [&](int64_t i, auto lanes) {
    const vec own = through(i, lanes) * scale - load(x + i, lanes) * pull;
    store(out + i, beside == nullptr ? own : rounded<T>(own) + load(beside + i, lanes), lanes);
  });
}

// sum = residual + update, and the norm of the sum.
template <typename T>
void add_norm_row(const T* residual, const T* update, const T* weight, T* sum, T* out,
                  int64_t width, float eps) {
  sweep(width, [&](int64_t i, auto lanes) {
    store(sum + i, load(residual + i, lanes) + load(update + i, lanes), lanes);
  });
  norm_row(sum, weight, out, width, eps);
}

template <typename T>
void gate_row(const T* x, T* out, int64_t width) {
  sweep(width, [&](int64_t i, auto lanes) {
    const vec g = load(x + i, lanes);
    store(out + i, rounded<T>(g / (exponential(-g) + 1.0f)) * load(x + width + i, lanes), lanes);
  });
}

}  // namespace

void norm_rows(const bf16* x, const bf16* weight, bf16* out, int64_t width, float eps,
               int64_t begin, int64_t end) {
  for (int64_t r = begin * width; r < end * width; r += width)
    norm_row(x + r, weight, out + r, width, eps);
}

void add_norm_rows(bf16* residual, const bf16* update, const bf16* weight, bf16* out,
                   int64_t width, float eps, int64_t begin, int64_t end) {
  for (int64_t r = begin * width; r < end * width; r += width)
    add_norm_row(residual + r, update + r, weight, residual + r, out + r, width, eps);
}

void gate_rows(const bf16* x, bf16* out, int64_t width, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) gate_row(x + 2 * r * width, out + r * width, width);
}

// x [N, d] -> weight * x / rms(x).
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  at::Tensor out = at::empty_like(x);
  const int64_t width = x.size(-1), rows = x.numel() / width;
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T *from = data<T>(x), *by = data<T>(weight);
    T* to = data_out<T>(out);
    at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        norm_row(from + r * width, by, to + r * width, width, static_cast<float>(eps));
    });
  });
  return out;
}

// The gradient of rms_norm's input, plus one that reaches it `beside` the norm; the mean square is
// computed again.
at::Tensor rms_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                             double eps, const std::optional<at::Tensor>& beside) {
  at::Tensor out = at::empty_like(x);
  const int64_t width = x.size(-1), rows = x.numel() / width;
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T *from = data<T>(x), *by = data<T>(weight), *up = data<T>(grad);
    const T* more = beside ? data<T>(*beside) : nullptr;
    T* to = data_out<T>(out);
    at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * width; i < end * width; i += width)
        norm_row_backward(up + i, from + i, by, more == nullptr ? nullptr : more + i, to + i, width,
                          static_cast<float>(eps));
    });
  });
  return out;
}

// sum = residual + update, and the norm of the sum.
void add_rms_norm_to(const at::Tensor& residual, const at::Tensor& update, const at::Tensor& weight,
                     double eps, at::Tensor& sum, at::Tensor& normed) {
  const int64_t width = residual.size(-1), rows = residual.numel() / width;
  by_type(residual, [&](auto type) {
    using T = decltype(type);
    const T *from = data<T>(residual), *more = data<T>(update), *by = data<T>(weight);
    T *to = data_out<T>(sum), *out = data_out<T>(normed);
    at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin * width; r < end * width; r += width)
        add_norm_row(from + r, more + r, by, to + r, out + r, width, static_cast<float>(eps));
    });
  });
}

// residual + update, and the norm of the sum.
std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& residual,
                                                const at::Tensor& update, const at::Tensor& weight,
                                                double eps) {
  at::Tensor sum = at::empty_like(residual), out = at::empty_like(residual);
  add_rms_norm_to(residual, update, weight, eps, sum, out);
  return {sum, out};
}

// The first `heads` heads of x [N, all heads, D] are turned in place by cos and sin [N, D].
void rotary_(at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t heads) {
  const int64_t rows = x.size(0), all = x.size(1), dim = x.size(2);
  by_type(x, [&](auto type) {
    using T = decltype(type);
    T* values = data_out<T>(x);
    const T *c = data<T>(cos), *s = data<T>(sin);
    at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t h = 0; h < heads; ++h) {
          T* head = values + (r * all + h) * dim;
          rotate(head, c + r * dim, s + r * dim, head, dim, false);
        }
    });
  });
}

// Gradients of q, k and v, [N, heads, D] with any row and head strides, to the gradient of their
// common product [N, (H + 2 H_kv) D].
at::Tensor rotary_backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t rows = q.size(0), heads = q.size(1), kv = k.size(1), dim = q.size(2);
  at::Tensor out = at::empty({rows, (heads + 2 * kv) * dim}, q.options());
  by_type(q, [&](auto type) {
    using T = decltype(type);
    const T *c = data<T>(cos), *s = data<T>(sin);
    T* to = data_out<T>(out);
    at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* row = to + r * (heads + 2 * kv) * dim;
        for (int64_t h = 0; h < heads; ++h, row += dim)
          rotate(data<T>(q) + r * q.stride(0) + h * q.stride(1), c + r * dim, s + r * dim, row, dim,
                 true);
        for (int64_t h = 0; h < kv; ++h, row += dim)
          rotate(data<T>(k) + r * k.stride(0) + h * k.stride(1), c + r * dim, s + r * dim, row, dim,
                 true);
        for (int64_t h = 0; h < kv; ++h, row += dim)
          std::memcpy(row, data<T>(v) + r * v.stride(0) + h * v.stride(1), dim * sizeof(T));
      }
    });
  });
  return out;
}

// silu(gate) * up of x = [gate | up], [N, 2 I] -> [N, I].
at::Tensor silu_mul(const at::Tensor& x) {
  const int64_t width = x.size(-1) / 2, rows = x.numel() / (2 * width);
  at::Tensor out = at::empty({rows, width}, x.options());
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(x);
    T* to = data_out<T>(out);
    at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) gate_row(from + 2 * r * width, to + r * width, width);
    });
  });
  return out;
}

// The gradient of silu_mul's input.
at::Tensor silu_mul_backward(const at::Tensor& grad, const at::Tensor& x) {
  at::Tensor out = at::empty_like(x);
  const int64_t width = x.size(-1) / 2, rows = x.numel() / (2 * width);
  by_type(x, [&](auto type) {
    using T = decltype(type);
    const T *from = data<T>(x), *upstream = data<T>(grad);
    T* to = data_out<T>(out);
    at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T *gate = from + 2 * r * width, *up = gate + width, *g = upstream + r * width;
        T *d_gate = to + 2 * r * width, *d_up = d_gate + width;
        sweep(width, [&](int64_t i, auto lanes) {
          const vec x0 = load(gate + i, lanes), g0 = load(g + i, lanes);
          const vec sigmoid = 1.0f / (exponential(-x0) + 1.0f);
          store(d_up + i, g0 * rounded<T>(x0 * sigmoid), lanes);
          const vec through = rounded<T>(g0 * load(up + i, lanes));
          store(d_gate + i, through * sigmoid * (x0 * (1.0f - sigmoid) + 1.0f), lanes);
        });
      }
    });
  });
  return out;
}

TORCH_LIBRARY_FRAGMENT(rlprompt_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", &rms_norm);
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, Tensor? beside) -> Tensor",
      &rms_norm_backward);
  m.def(
      "add_rms_norm(Tensor residual, Tensor update, Tensor weight, float eps) -> (Tensor, Tensor)",
      &add_rms_norm);
  m.def("rotary_(Tensor(a!) x, Tensor cos, Tensor sin, int heads) -> ()", &rotary_);
  m.def("rotary_backward(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin) -> Tensor",
        &rotary_backward);
  m.def("silu_mul(Tensor x) -> Tensor", &silu_mul);
  m.def("silu_mul_backward(Tensor grad, Tensor x) -> Tensor", &silu_mul_backward);
}

}  // namespace rlprompt

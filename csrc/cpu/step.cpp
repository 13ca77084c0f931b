// The base optimizer's step from the saved weights, one chunk.
// SGD: reads saved, g (and m); writes theta (and m). Adam: reads saved, g, m, v; writes theta, m, v. bSAM: reads saved,
// g, m, s; writes theta, m.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

template <class T>
void sgd_chunk(T* theta, const T* g, T* m, const T* saved, int64_t numel, const SgdOptions& options, bool stream) {
  using C = typename ArithmeticOf<T>::type;
  C saved_buffer[kBlock], g_buffer[kBlock], m_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  const Sgd<C> sgd = sgd_of<C>(options);
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
    const C* weights = load<C>(saved + b, saved_buffer, n);
    const C* gradient = load<C>(g + b, g_buffer, n);
    C* out = result<C>(theta + b, out_buffer, stream);
    if (m) {
      const C* old = load<C>(m + b, m_buffer, n);
      C* average = result<C>(m + b, m_buffer, false);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        C next = old[i];
        out[i] = Sgd<C>::step(sgd, weights[i], gradient[i], &next);
        average[i] = next;
      }
      store<C>(m + b, average, static_cast<T*>(nullptr), n, false);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = Sgd<C>::step(sgd, weights[i], gradient[i], static_cast<C*>(nullptr));
    }
    store<C>(theta + b, out, narrow_buffer, n, stream);
  }
  finish(stream);
}

template <class T>
void adam_chunk(T* theta, const T* g, T* m, T* v, const T* saved, int64_t numel, double step,
                const AdamOptions& options, bool stream) {
  using C = typename ArithmeticOf<T>::type;
  C saved_buffer[kBlock], g_buffer[kBlock], m_buffer[kBlock], v_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  const Adam<C> adam = adam_of<C>(options, bias_correction(options.beta1, step), bias_correction(options.beta2, step));
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
    const C* weights = load<C>(saved + b, saved_buffer, n);
    const C* gradient = load<C>(g + b, g_buffer, n);
    const C* old_m = load<C>(m + b, m_buffer, n);
    const C* old_v = load<C>(v + b, v_buffer, n);
    C* next_m = result<C>(m + b, m_buffer, false);
    C* next_v = result<C>(v + b, v_buffer, false);
    C* out = result<C>(theta + b, out_buffer, stream);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      C first = old_m[i], second = old_v[i];
      out[i] = Adam<C>::step(adam, weights[i], gradient[i], first, second);
      next_m[i] = first;
      next_v[i] = second;
    }
    store<C>(m + b, next_m, static_cast<T*>(nullptr), n, false);
    store<C>(v + b, next_v, static_cast<T*>(nullptr), n, false);
    store<C>(theta + b, out, narrow_buffer, n, stream);
  }
  finish(stream);
}

template <class T>
void bsam_chunk(T* theta, const T* g, T* m, const T* s, const T* saved, int64_t numel, double lr, double beta1,
                double weight_decay, bool stream) {
  using C = typename ArithmeticOf<T>::type;
  C saved_buffer[kBlock], g_buffer[kBlock], m_buffer[kBlock], s_buffer[kBlock], out_buffer[kBlock];
  T narrow_buffer[kBlock];
  const Bsam<C> bsam{C(lr), C(beta1), C(1 - beta1), C(weight_decay)};
  for (int64_t b = 0; b < numel; b += kBlock) {
    const int64_t n = smaller(kBlock, numel - b);
    const C* weights = load<C>(saved + b, saved_buffer, n);
    const C* gradient = load<C>(g + b, g_buffer, n);
    const C* old = load<C>(m + b, m_buffer, n);
    const C* precision = load<C>(s + b, s_buffer, n);
    C* average = result<C>(m + b, m_buffer, false);
    C* out = result<C>(theta + b, out_buffer, stream);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      C next = old[i];
      out[i] = Bsam<C>::step(bsam, weights[i], gradient[i], next, precision[i]);
      average[i] = next;
    }
    store<C>(m + b, average, static_cast<T*>(nullptr), n, false);
    store<C>(theta + b, out, narrow_buffer, n, stream);
  }
  finish(stream);
}

}  // namespace

void sgd(Dtype dtype, void* theta, const void* g, void* m, const void* saved, int64_t numel, const SgdOptions& options,
         bool stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    sgd_chunk(static_cast<T*>(theta), static_cast<const T*>(g), static_cast<T*>(m), static_cast<const T*>(saved), numel,
              options, stream);
  });
}

void adam(Dtype dtype, void* theta, const void* g, void* m, void* v, const void* saved, int64_t numel, double step,
          const AdamOptions& options, bool stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    adam_chunk(static_cast<T*>(theta), static_cast<const T*>(g), static_cast<T*>(m), static_cast<T*>(v),
               static_cast<const T*>(saved), numel, step, options, stream);
  });
}

void bsam(Dtype dtype, void* theta, const void* g, void* m, const void* precision, const void* saved, int64_t numel,
          double lr, double beta1, double weight_decay, bool stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    bsam_chunk(static_cast<T*>(theta), static_cast<const T*>(g), static_cast<T*>(m), static_cast<const T*>(precision),
               static_cast<const T*>(saved), numel, lr, beta1, weight_decay, stream);
  });
}

}  // namespace lets::cpu::LETS_ISA

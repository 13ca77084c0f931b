// The base optimizer's step from the saved weights, one chunk.
// SGD: reads saved, g (and m); writes theta (and m). Adam: reads saved, g, m, v; writes theta, m, v. Lion: reads saved,
// g, m; writes theta, m. bSAM: reads saved, g, m, s; writes theta, m.
#include "block.h"

namespace lets::cpu::LETS_ISA {
namespace {

// A block of a list that the optimizer has beside the weights and the gradient, before the step and after it.
template <class C>
struct Updated {
  const C* before;
  C* after;
};
template <class T>
LETS_FN Updated<Arithmetic<T>> state(Output<T>& list, int64_t begin, int64_t n) {
  return {load(list, begin, n), result(list, begin)};
}
template <class T>
LETS_FN void write_back(Output<T>& list, int64_t begin, int64_t n) {
  store(list, result(list, begin), begin, n);
}
template <class C>
LETS_FN void set(const Updated<C>& state, int64_t i, C value) {
  state.after[i] = value;
}

// A state that the step only reads.
template <class C>
struct Given {
  const C* before;
};
template <class T>
LETS_FN Given<Arithmetic<T>> state(Input<T>& list, int64_t begin, int64_t n) {
  return {load(list, begin, n)};
}
template <class T>
LETS_FN void write_back(Input<T>&, int64_t, int64_t) {}
template <class C>
LETS_FN void set(const Given<C>&, int64_t, C) {}

template <class Optimizer, class C, class... State>
LETS_FN void elements(const Optimizer& optimizer, C* out, const C* weights, const C* gradient, int64_t n,
                      State... state) {
  auto element = [&](int64_t i, auto... values) {
    out[i] = Optimizer::step(optimizer, weights[i], gradient[i], values...);
    (set(state, i, values), ...);
  };
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) element(i, state.before[i]...);
}

// How many bytes ahead a line asks for what follows it. Up to four lists are read and three written: requests for a
// whole block of each at once would wait for each other.
constexpr int64_t kBytesAhead = 2048;

template <class C>
LETS_FN Updated<C> whole(Output<C>& list) {
  return {list.list, list.list};
}
template <class C>
LETS_FN Given<C> whole(Input<C>& list) {
  return {list.list};
}

// A step where storage and arithmetic have the same type, so that nothing goes through a buffer.
template <class C, class Options, class Optimizer, class... State>
LETS_FN void step_in_place(const Options& c, const Optimizer& optimizer, State... state) {
  auto* const to = static_cast<C*>(c.params);
  const auto* weights = static_cast<const C*>(c.saved);
  const auto* gradient = static_cast<const C*>(c.grads);
  constexpr int64_t kAhead = kBytesAhead / int64_t(sizeof(C));
  const auto step = [&](int64_t i, auto... values) {
    const C out = Optimizer::step(optimizer, weights[i], gradient[i], values...);
    (set(state, i, values), ...);
    return out;
  };
  const auto element = [&](int64_t i) { return step(i, state.before[i]...); };
  if (c.nontemporal) {
    fill_nontemporal(to, c.numel, element, [&](int64_t i) {
      __builtin_prefetch(weights + i + kAhead);
      __builtin_prefetch(gradient + i + kAhead);
      (__builtin_prefetch(state.before + i + kAhead), ...);
    });
    finish(true);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < c.numel; ++i) to[i] = element(i);
  }
}

template <class T, class Options, class Optimizer, class... List>
LETS_FN void step(const Options& c, const Optimizer optimizer, List&... lists) {
  if constexpr (sizeof(T) == sizeof(Arithmetic<T>)) {
    return step_in_place<T>(c, optimizer, whole(lists)...);
  } else {
    Input<T> saved(c.saved), g(c.grads);
    Output<T> theta(c.params, c.nontemporal);
    for (int64_t b = 0; b < c.numel; b += kBlock) {
      const int64_t n = smaller(kBlock, c.numel - b);
      auto* out = result(theta, b);
      elements(optimizer, out, load(saved, b, n), load(g, b, n), n, state(lists, b, n)...);
      (write_back(lists, b, n), ...);
      store(theta, out, b, n);
    }
    finish(c.nontemporal);
  }
}

template <class T>
void walk(const chunk_of::restore_sgd_& c) {
  const auto sgd = sgd_of<Arithmetic<T>>(c, c);
  if (c.momenta) {
    Output<T> m(c.momenta);
    step<T>(c, sgd, m);
  } else {
    step<T>(c, sgd);
  }
}

template <class T>
void walk(const chunk_of::restore_adamw_& c) {
  Output<T> m(c.exp_avgs), v(c.exp_avg_sqs);
  step<T>(c, adam_of<Arithmetic<T>>(c, double(*c.steps)), m, v);
}

template <class T>
void walk(const chunk_of::restore_lion_& c) {
  Output<T> m(c.exp_avgs);
  step<T>(c, lion_of<Arithmetic<T>>(c), m);
}

template <class T>
void walk(const chunk_of::restore_bsam_& c) {
  Output<T> m(c.exp_avgs);
  Input<T> s(c.precisions);
  step<T>(c, bsam_of<Arithmetic<T>>(c), m, s);
}

}  // namespace

LETS_OP(restore_sgd_)
LETS_OP(restore_adamw_)
LETS_OP(restore_lion_)
LETS_OP(restore_bsam_)

}  // namespace lets::cpu::LETS_ISA

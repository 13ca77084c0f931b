// The base optimizer's step from the saved weights, where they are perturbed, or from the weights as they are.
// SGD: reads saved, g (and m); writes theta (and m). Adam: reads saved, g, m, v; writes theta, m, v. Lion: reads saved,
// g, m; writes theta, m. Variational SAM: reads saved, g, m, s; writes theta, m.
#include <type_traits>

#include "block.h"

namespace lets::cuda {
namespace {

// Some elements of a list that the optimizer has beside the weights; only read if those are const.
template <class C, int V, class E>
struct State {
  E* list;
  Values<C, V> values;

  LETS_DEVICE State of(E* list, int i) {
    if constexpr (std::is_const_v<E>) return {list, fetch<C, V>(list, i)};
    return {list, load<C, V>(list, i)};
  }
  LETS_DEVICE void write_back(const State& state, int i) {
    if constexpr (!std::is_const_v<E>) store<V>(state.list, i, state.values);
  }
};

template <class Optimizer, class C, int V, class T, class... States>
LETS_DEVICE void step_at(int i, const Optimizer& optimizer, T* theta, Values<C, V> weights,
                         const Values<C, V>& gradient, States... states) {
#pragma unroll
  for (int j = 0; j < V; ++j)
    weights.value[j] = Optimizer::step(optimizer, weights.value[j], gradient.value[j], states.values.value[j]...);
  (States::write_back(states, i), ...);
  store<V>(theta, i, weights);
}

// A step on one chunk; where the gate is shut the weights are restored.
template <class T, class Each, class Launch, class Optimizer, class G, class... E>
LETS_DEVICE void step(const Piece<Each>& piece, const Launch& c, const Optimizer& optimizer, const T* saved, G* g,
                      E*... lists) {
  using C = Arithmetic<T>;
  const bool go = *c.gate != 0, perturbed = *c.dirty != 0;
  if (!go && !perturbed) return;
  T* theta = at<T>(piece, 0);
  const T* from = perturbed ? saved : theta;
  over<T>(piece, all_aligned(theta, g, saved, lists...), [&]<int V>(int i) {
    if (go) {
      step_at(i, optimizer, theta, load<C, V>(from, i), State<C, V, G>::of(g, i).values,
              State<C, V, E>::of(lists, i)...);
    } else {
      pack_at<V>(theta, i) = pack_at<V>(saved, i);
    }
  });
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
sgd_kernel(LETS_PARAMETER BatchOf<launch_of::restore_sgd_, Capacity> batch, launch_of::restore_sgd_ c) {
  const auto piece = piece_of(batch, int32_t(blockIdx.x));
  const auto sgd = sgd_of<Arithmetic<T>>(piece.each, c);
  const T *saved = at<const T>(piece, 3), *g = at<const T>(piece, 1);
  if (T* m = maybe_at<T>(piece, 2)) {
    step(piece, c, sgd, saved, g, m);
  } else {
    step(piece, c, sgd, saved, g);
  }
}

constexpr int kSteps = 4;  // Adam's step counts in a run

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
adam_kernel(LETS_PARAMETER BatchOf<launch_of::restore_adamw_, Capacity> batch, launch_of::restore_adamw_ c) {
  const auto piece = piece_of(batch, int32_t(blockIdx.x));
  LETS_SHARED double bias[2];
  if (threadIdx.x < 2) {  // the count is raised when all have read it
    const double step = double(*reinterpret_cast<const float*>(piece.run.address[kSteps]) + 1.0f);
    bias[threadIdx.x] = bias_correction(threadIdx.x == 0 ? piece.each.beta1 : piece.each.beta2, step);
  }
  __syncthreads();
  const auto adam = adam_of<Arithmetic<T>>(piece.each, c, bias[0], bias[1]);
  // ptxas spills otherwise: a gradient of two bytes is loaded as what is only read, a larger one as if it were written.
  using Gradient = std::conditional_t<sizeof(T) == 2, const T, T>;
  step(piece, c, adam, at<const T>(piece, 5), at<Gradient>(piece, 1), at<T>(piece, 2), at<T>(piece, 3));
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
lion_kernel(LETS_PARAMETER BatchOf<launch_of::restore_lion_, Capacity> batch, launch_of::restore_lion_ c) {
  const auto piece = piece_of(batch, int32_t(blockIdx.x));
  step(piece, c, lion_of<Arithmetic<T>>(piece.each), at<const T>(piece, 3), at<const T>(piece, 1), at<T>(piece, 2));
}

template <class T, int Capacity>
LETS_KERNEL_FOR(sizeof(T) == 8 ? 3 : 4)
bsam_kernel(LETS_PARAMETER BatchOf<launch_of::restore_bsam_, Capacity> batch, launch_of::restore_bsam_ c) {
  const auto piece = piece_of(batch, int32_t(blockIdx.x));
  step(piece, c, bsam_of<Arithmetic<T>>(piece.each), at<const T>(piece, 4), at<const T>(piece, 1), at<T>(piece, 2),
       at<const T>(piece, 3));
}

// Runs last, when nobody reads the counts any more.
template <int Capacity>
LETS_KERNEL count_kernel(LETS_PARAMETER BatchOf<launch_of::restore_adamw_, Capacity> batch, const double* gate) {
  if (*gate == 0) return;
  for (int i = int(threadIdx.x); i < batch.runs; i += kThreads)
    *reinterpret_cast<float*>(batch.run[i].address[kSteps]) += 1;
}

}  // namespace

void restore_sgd_(const launch_of::restore_sgd_& c) {
  on_chunks(c, [&]<class T, int Capacity>() { return &sgd_kernel<T, Capacity>; });
  set(c.dirty, 0, c.stream);
}

void restore_adamw_(const launch_of::restore_adamw_& c) {
  on_chunks(c, [&]<class T, int Capacity>() { return &adam_kernel<T, Capacity>; });
  const auto once = [](int64_t) { return int64_t(1); };
  using Op = launch_of::restore_adamw_;
  in_batches(c.runs, c.each, c.count, once, [&]<int Capacity>(const BatchOf<Op, Capacity>& batch, int32_t) {
    launch(&count_kernel<Capacity>, 1, kThreads, c.stream, batch, c.gate);
  });
  set(c.dirty, 0, c.stream);
}

void restore_lion_(const launch_of::restore_lion_& c) {
  on_chunks(c, [&]<class T, int Capacity>() { return &lion_kernel<T, Capacity>; });
  set(c.dirty, 0, c.stream);
}

void restore_bsam_(const launch_of::restore_bsam_& c) {
  on_chunks(c, [&]<class T, int Capacity>() { return &bsam_kernel<T, Capacity>; });
  set(c.dirty, 0, c.stream);
}

}  // namespace lets::cuda

// The base optimizer's step from the saved weights, where they are perturbed, or from the weights as they are.
// SGD: reads saved, g (and m); writes theta (and m). Adam: reads saved, g, m, v; writes theta, m, v. Lion: reads saved,
// g, m; writes theta, m. Variational SAM: reads saved, g, m, s; writes theta, m.
#include "block.h"

namespace lets::cuda {
namespace {

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
sgd_kernel(LETS_PARAMETER Batch<Capacity> batch, launch_of::restore_sgd_ c) {
  using C = typename ArithmeticOf<T>::type;
  const bool go = *c.gate != 0, perturbed = *c.dirty != 0;
  if (!go && !perturbed) return;
  const Sgd<C> sgd = sgd_of<C>(c);
  const Piece piece = piece_of(batch, int32_t(blockIdx.x));
  const Run& run = batch.run[piece.run];
  T* theta = reinterpret_cast<T*>(run.address[0]) + piece.begin;
  const T* g = reinterpret_cast<const T*>(run.address[1]) + piece.begin;
  T* m = run.address[2] ? reinterpret_cast<T*>(run.address[2]) + piece.begin : nullptr;
  const T* saved = reinterpret_cast<const T*>(run.address[3]) + piece.begin;
  const T* from = perturbed ? saved : theta;
  const bool all_aligned = aligned(theta) && aligned(g) && aligned(m) && aligned(saved);
  over<T>(piece.numel, all_aligned, [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    if (!go) {
      pack_at<V>(theta, i) = pack_at<V>(saved, i);
      return;
    }
    auto weights = load<C, V>(from, i);
    const auto gradient = fetch<C, V>(g, i);
    if (m) {
      auto average = load<C, V>(m, i);
#pragma unroll
      for (int j = 0; j < V; ++j)
        weights.value[j] = Sgd<C>::step(sgd, weights.value[j], gradient.value[j], &average.value[j]);
      store<V>(m, i, average);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j)
        weights.value[j] = Sgd<C>::step(sgd, weights.value[j], gradient.value[j], static_cast<C*>(nullptr));
    }
    store<V>(theta, i, weights);
  });
}

constexpr int kSteps = 4;  // Adam's step counts in a run

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
adam_kernel(LETS_PARAMETER Batch<Capacity> batch, launch_of::restore_adamw_ c) {
  using C = typename ArithmeticOf<T>::type;
  LETS_SHARED double bias[2];
  if (threadIdx.x < 2) {  // the count is raised when all have read it
    const Run& run = batch.run[run_of(batch, int32_t(blockIdx.x))];
    const double step = double(*reinterpret_cast<const float*>(run.address[kSteps]) + 1.0f);
    bias[threadIdx.x] = bias_correction(threadIdx.x == 0 ? c.beta1 : c.beta2, step);
  }
  __syncthreads();
  const bool go = *c.gate != 0, perturbed = *c.dirty != 0;
  if (!go && !perturbed) return;
  const Piece piece = piece_of(batch, int32_t(blockIdx.x));
  const Run& run = batch.run[piece.run];
  const Adam<C> adam = adam_of<C>(c, bias[0], bias[1]);
  T* theta = reinterpret_cast<T*>(run.address[0]) + piece.begin;
  const T* g = reinterpret_cast<const T*>(run.address[1]) + piece.begin;
  T* m = reinterpret_cast<T*>(run.address[2]) + piece.begin;
  T* v = reinterpret_cast<T*>(run.address[3]) + piece.begin;
  const T* saved = reinterpret_cast<const T*>(run.address[5]) + piece.begin;
  const T* from = perturbed ? saved : theta;
  const bool all_aligned = aligned(theta) && aligned(g) && aligned(m) && aligned(v) && aligned(saved);
  over<T>(piece.numel, all_aligned, [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    if (!go) {
      pack_at<V>(theta, i) = pack_at<V>(saved, i);
      return;
    }
    auto weights = load<C, V>(from, i);
    const auto gradient = load<C, V>(g, i);
    auto first = load<C, V>(m, i), second = load<C, V>(v, i);
#pragma unroll
    for (int j = 0; j < V; ++j)
      weights.value[j] = Adam<C>::step(adam, weights.value[j], gradient.value[j], first.value[j], second.value[j]);
    store<V>(m, i, first);
    store<V>(v, i, second);
    store<V>(theta, i, weights);
  });
}

template <class T, int Capacity>
LETS_KERNEL_FOR(4)
lion_kernel(LETS_PARAMETER Batch<Capacity> batch, launch_of::restore_lion_ c) {
  using C = typename ArithmeticOf<T>::type;
  const bool go = *c.gate != 0, perturbed = *c.dirty != 0;
  if (!go && !perturbed) return;
  const Lion<C> lion = lion_of<C>(c);
  const Piece piece = piece_of(batch, int32_t(blockIdx.x));
  const Run& run = batch.run[piece.run];
  T* theta = reinterpret_cast<T*>(run.address[0]) + piece.begin;
  const T* g = reinterpret_cast<const T*>(run.address[1]) + piece.begin;
  T* m = reinterpret_cast<T*>(run.address[2]) + piece.begin;
  const T* saved = reinterpret_cast<const T*>(run.address[3]) + piece.begin;
  const T* from = perturbed ? saved : theta;
  const bool all_aligned = aligned(theta) && aligned(g) && aligned(m) && aligned(saved);
  over<T>(piece.numel, all_aligned, [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    if (!go) {
      pack_at<V>(theta, i) = pack_at<V>(saved, i);
      return;
    }
    auto weights = load<C, V>(from, i), average = load<C, V>(m, i);
    const auto gradient = fetch<C, V>(g, i);
#pragma unroll
    for (int j = 0; j < V; ++j)
      weights.value[j] = Lion<C>::step(lion, weights.value[j], gradient.value[j], average.value[j]);
    store<V>(m, i, average);
    store<V>(theta, i, weights);
  });
}

template <class T, int Capacity>
LETS_KERNEL_FOR(sizeof(T) == 8 ? 3 : 4)
bsam_kernel(LETS_PARAMETER Batch<Capacity> batch, launch_of::restore_bsam_ c) {
  using C = typename ArithmeticOf<T>::type;
  const bool go = *c.gate != 0, perturbed = *c.dirty != 0;
  if (!go && !perturbed) return;
  const Bsam<C> bsam = bsam_of<C>(c);
  const Piece piece = piece_of(batch, int32_t(blockIdx.x));
  const Run& run = batch.run[piece.run];
  T* theta = reinterpret_cast<T*>(run.address[0]) + piece.begin;
  const T* g = reinterpret_cast<const T*>(run.address[1]) + piece.begin;
  T* m = reinterpret_cast<T*>(run.address[2]) + piece.begin;
  const T* s = reinterpret_cast<const T*>(run.address[3]) + piece.begin;
  const T* saved = reinterpret_cast<const T*>(run.address[4]) + piece.begin;
  const T* from = perturbed ? saved : theta;
  const bool all_aligned = aligned(theta) && aligned(g) && aligned(m) && aligned(s) && aligned(saved);
  over<T>(piece.numel, all_aligned, [&](auto width, int i) {
    constexpr int V = decltype(width)::value;
    if (!go) {
      pack_at<V>(theta, i) = pack_at<V>(saved, i);
      return;
    }
    auto weights = load<C, V>(from, i), average = load<C, V>(m, i);
    const auto gradient = fetch<C, V>(g, i), precision = fetch<C, V>(s, i);
#pragma unroll
    for (int j = 0; j < V; ++j)
      weights.value[j] = Bsam<C>::step(bsam, weights.value[j], gradient.value[j], average.value[j], precision.value[j]);
    store<V>(m, i, average);
    store<V>(theta, i, weights);
  });
}

// Runs last, when nobody reads the counts any more.
template <int Capacity>
LETS_KERNEL count_kernel(LETS_PARAMETER Batch<Capacity> batch, const double* gate) {
  if (*gate == 0) return;
  for (int i = int(threadIdx.x); i < batch.runs; i += kThreads)
    *reinterpret_cast<float*>(batch.run[i].address[kSteps]) += 1;
}

}  // namespace

void restore_sgd_(const launch_of::restore_sgd_& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    in_batches(c.runs, c.count, pieces, [&](const auto& batch, int32_t chunks) {
      launch(&sgd_kernel<T, capacity_of<decltype(batch)>>, chunks, kThreads, c.stream, batch, c);
    });
  });
  set(c.dirty, 0, c.stream);
}

void restore_adamw_(const launch_of::restore_adamw_& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    in_batches(c.runs, c.count, pieces, [&](const auto& batch, int32_t chunks) {
      launch(&adam_kernel<T, capacity_of<decltype(batch)>>, chunks, kThreads, c.stream, batch, c);
    });
  });
  const auto once = [](const Run&) { return int64_t(1); };
  in_batches(c.runs, c.count, once, [&](const auto& batch, int32_t) {
    launch(&count_kernel<capacity_of<decltype(batch)>>, 1, kThreads, c.stream, batch, c.gate);
  });
  set(c.dirty, 0, c.stream);
}

void restore_lion_(const launch_of::restore_lion_& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    in_batches(c.runs, c.count, pieces, [&](const auto& batch, int32_t chunks) {
      launch(&lion_kernel<T, capacity_of<decltype(batch)>>, chunks, kThreads, c.stream, batch, c);
    });
  });
  set(c.dirty, 0, c.stream);
}

void restore_bsam_(const launch_of::restore_bsam_& c) {
  with_type(c.dtype, [&](auto type) {
    using T = decltype(type);
    in_batches(c.runs, c.count, pieces, [&](const auto& batch, int32_t chunks) {
      launch(&bsam_kernel<T, capacity_of<decltype(batch)>>, chunks, kThreads, c.stream, batch, c);
    });
  });
  set(c.dirty, 0, c.stream);
}

}  // namespace lets::cuda

// The arithmetic of every op, once, for the CPU and for CUDA.
//
// `C` is the arithmetic type: float for float32, bfloat16 and float16 storage, double for float64.
// Contraction to fused multiply-add is off in the build, so one formula gives the same bits on every instruction set.
#pragma once

#include "layout.h"

#if defined(__CUDACC__)
#define LETS_FN static __host__ __device__ __forceinline__
#else
#define LETS_FN static inline __attribute__((always_inline))
#endif

namespace lets {

// ---- storage types

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class To, class From>
LETS_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
#if defined(__CUDACC__)
  memcpy(&to, &from, sizeof(to));
#else
  __builtin_memcpy(&to, &from, sizeof(to));
#endif
  return to;
}

LETS_FN float widen(float x) { return x; }
LETS_FN double widen(double x) { return x; }
LETS_FN float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
// Branch-free, so that loops over it vectorise without the F16C instructions.
LETS_FN float widen(Half x) {
#if defined(__CUDA_ARCH__)
  float to;
  asm("cvt.f32.f16 %0, %1;" : "=f"(to) : "h"(x.bits));
  return to;
#endif
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = normal + (112u << 23);  // infinity and NaN
  const uint32_t subnormal = bit_cast<uint32_t>(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t bits = magnitude < 0x400u ? subnormal : magnitude < 0x7c00u ? normal : special;
  return bit_cast<float>(bits | (uint32_t(x.bits & 0x8000u) << 16));
}

template <class T>
using Arithmetic = decltype(widen(T{}));

// Round to nearest, ties to even. GPUs have an instruction for it; only the bits of a NaN differ.
LETS_FN void narrow(float x, float& to) { to = x; }
LETS_FN void narrow(double x, double& to) { to = x; }
LETS_FN void narrow(float x, BFloat16& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
  return;
#endif
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
LETS_FN void narrow(float x, Half& to) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
  return;
#endif
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  // The last bit of the float 0.5 is 2^-24, the spacing of subnormal halves: the addition rounds to it.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t rounded = magnitude < 0x38800000u ? subnormal : magnitude < 0x47800000u ? normal : special;
  to.bits = uint16_t(rounded | ((bits >> 16) & 0x8000u));
}

// Calls f(T{}) with the storage type.
template <class F>
static inline __attribute__((always_inline)) auto with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float64:
      return f(double{});
    case Dtype::bfloat16:
      return f(BFloat16{});
    case Dtype::float16:
      return f(Half{});
    default:
      return f(float{});
  }
}

// ---- elementary functions; no <cmath>, whose inline functions must not be compiled for several instruction sets

#if defined(__CUDACC__)
LETS_FN float absolute(float x) { return fabsf(x); }
LETS_FN double absolute(double x) { return fabs(x); }
LETS_FN float square_root(float x) { return sqrtf(x); }
LETS_FN double square_root(double x) { return sqrt(x); }
LETS_FN float power(float x, float y) { return powf(x, y); }
LETS_FN double power(double x, double y) { return pow(x, y); }
#else
LETS_FN float absolute(float x) { return __builtin_fabsf(x); }
LETS_FN double absolute(double x) { return __builtin_fabs(x); }
LETS_FN float square_root(float x) { return __builtin_sqrtf(x); }
LETS_FN double square_root(double x) { return __builtin_sqrt(x); }
LETS_FN float power(float x, float y) { return __builtin_powf(x, y); }
LETS_FN double power(double x, double y) { return __builtin_pow(x, y); }
#endif
LETS_FN bool is_finite(double x) { return x - x == 0; }

// ---- where to perturb: SAM (Foret et al., 2021, Eq. 2), ASAM (Kwon et al., 2021), LETS Eq. 7

// T of ASAM: |theta| + xi for one element, ||c|| + xi for a filter (magnitude is then the filter's norm).
template <class C>
LETS_FN C adaptive_scale(C magnitude, C xi) {
  return magnitude + xi;
}

// T of the diagonal Fisher information f = v^2 (Kim et al., 2022): T^2 = 1 / (1 + xi f). Where xi f overflows the 1 is
// far below it, and T = 1 / (sqrt(xi) |v|).
template <class C>
LETS_FN C fisher_scale(C v, C xi) {
  const C f = xi * (v * v);
  const bool near = f - f == 0;
  return (near ? C(1) : C(1) / square_root(xi)) / (near ? square_root(C(1) + f) : absolute(v));
}

// sign(x) |x|^(q-1), the gradient of |x|^q / q: how the dual norm's exponent shapes the perturbation.
template <class C>
LETS_FN C dual(C x, C q) {
  if (q == C(2)) return x;
  const C sign = C(x > 0) - C(x < 0);
  if (q == C(1)) return sign;
  return sign * power(absolute(x), q - C(1));
}

// epsilon = length * T dual(shrink * T v). For q = 2 and q = 1 the length holds the norm; else T v is divided by it
// before it is raised to a power, which could underflow. No perturbation at all for a gradient that is zero or not
// finite, or so small that the length overflows.
template <class C>
struct PerturbationScale {
  C length, shrink;
};
template <class C>
LETS_FN PerturbationScale<C> perturbation_scale(double total, double rho, double q) {
  if (!(total > 0) || !is_finite(total)) return {C(0), C(0)};
  const bool power_of_norm = q != 2 && q != 1;
  const C length = C(q == 2 ? rho / square_root(total) : rho);
  const C shrink = power_of_norm ? C(1 / power(total, 1 / q)) : C(1);
  if (!is_finite(double(length)) || !is_finite(double(shrink))) return {C(0), C(0)};
  return {length, shrink};
}

// ---- base optimizers: `Numbers` and `Flags` are structs of declared.h with a run's options, by the ops' names

template <class C>
struct Sgd {
  C lr, momentum, weight_decay;
  bool nesterov, maximize;

  // torch.optim.SGD with dampening 0; m is read and written only where momentum is not zero.
  LETS_FN C step(const Sgd& o, C theta, C g, C* m = nullptr) {
    if (o.maximize) g = -g;
    if (o.weight_decay != 0) g = g + o.weight_decay * theta;
    if (m) {
      *m = o.momentum * *m + g;
      g = o.nesterov ? g + o.momentum * *m : *m;
    }
    return o.lr == 0 ? theta : theta - o.lr * g;  // not even the sign of a zero changes
  }
  LETS_FN C step(const Sgd& o, C theta, C g, C& m) { return step(o, theta, g, &m); }
};

template <class C, class Numbers, class Flags>
LETS_FN Sgd<C> sgd_of(const Numbers& o, const Flags& flags) {
  return {C(o.lr), C(o.momentum), C(o.weight_decay), flags.nesterov, flags.maximize};
}

template <class C>
struct Adam {
  C shrink;        // 1 - lr weight_decay, the decoupled decay of AdamW; 1 for Adam
  C weight_decay;  // the coupled decay of Adam; 0 for AdamW
  C beta1, beta2, one_minus_beta1, one_minus_beta2;
  C step_size;  // lr / (1 - beta1^t)
  C root_bias;  // sqrt(1 - beta2^t)
  C eps;
  bool maximize;

  LETS_FN C step(const Adam& o, C theta, C g, C& m, C& v) {
    if (o.maximize) g = -g;
    theta = theta * o.shrink;
    if (o.weight_decay != 0) g = g + o.weight_decay * theta;
    m = m + o.one_minus_beta1 * (g - m);
    v = o.beta2 * v + o.one_minus_beta2 * (g * g);
    return o.step_size == 0 ? theta : theta - o.step_size * (m / (square_root(v) / o.root_bias + o.eps));
  }
};

// 1 - beta^t
LETS_FN double bias_correction(double beta, double step) { return 1 - power(beta, step); }

template <class C, class Numbers, class Flags>
LETS_FN Adam<C> adam_of(const Numbers& o, const Flags& flags, double bias1, double bias2) {
  return {flags.decoupled ? C(1 - o.lr * o.weight_decay) : C(1),
          flags.decoupled ? C(0) : C(o.weight_decay),
          C(o.beta1),
          C(o.beta2),
          C(1 - o.beta1),
          C(1 - o.beta2),
          C(o.lr / bias1),
          C(square_root(bias2)),
          C(o.eps),
          flags.maximize};
}
template <class C, class Options>
LETS_FN Adam<C> adam_of(const Options& o, double step) {
  return adam_of<C>(o, o, bias_correction(o.beta1, step), bias_correction(o.beta2, step));
}

// Lion (Chen et al., 2023, Algorithm 2): the step is the sign of one average of m and g, the new m is another.
template <class C>
struct Lion {
  C lr, beta1, beta2, one_minus_beta1, one_minus_beta2, weight_decay;

  LETS_FN C step(const Lion& o, C theta, C g, C& m) {
    const C sign = dual(o.beta1 * m + o.one_minus_beta1 * g, C(1));
    m = o.beta2 * m + o.one_minus_beta2 * g;
    return o.lr == 0 ? theta : theta - o.lr * (sign + o.weight_decay * theta);
  }
};

template <class C, class Numbers>
LETS_FN Lion<C> lion_of(const Numbers& o) {
  return {C(o.lr), C(o.beta1), C(o.beta2), C(1 - o.beta1), C(1 - o.beta2), C(o.weight_decay)};
}

// Variational SAM (Moellenhoff & Khan, 2023), its step: s is the precision, m the average.
template <class C>
struct Bsam {
  C lr, beta1, one_minus_beta1, weight_decay;

  LETS_FN C step(const Bsam& o, C theta, C g, C& m, C s) {
    m = o.beta1 * m + o.one_minus_beta1 * (g + o.weight_decay * theta);
    return o.lr == 0 ? theta : theta - o.lr * (m / s);
  }
};

template <class C, class Numbers>
LETS_FN Bsam<C> bsam_of(const Numbers& o) {
  return {C(o.lr), C(o.beta1), C(1 - o.beta1), C(o.weight_decay)};
}

// ---- vectors: moving averages, combinations, displacements, keys

template <class C>
LETS_FN C combined(C a, C x, C b, C y) {
  return a * x + b * y;
}

// What a step has moved a weight by.
template <class C>
LETS_FN C displacement(C now, C before) {
  return now - before;
}

// The precision after a gradient, of Variational SAM.
template <class C>
LETS_FN C precision_after(C s, C g, C beta2, C one_minus_beta2, C damping) {
  return beta2 * s + one_minus_beta2 * (square_root(s) * absolute(g) + damping);
}

// What elements are ranked by: |v| as float32, and below it a random word, which decides between equal values.
LETS_FN int64_t key_of(float v, uint32_t word) {
  return int64_t(bit_cast<uint32_t>(absolute(v))) << 32 | int64_t(word);
}
LETS_FN int64_t key_of(uint32_t word) { return int64_t(word) << 31; }

// ---- the gradient in the radius: LETS (Wang et al., 2024), one element's share

// Diagonal curvature H = diag(g_hat^2); `unit` is the element of T sign(Tv)|Tv|^(q-1), not yet divided by its norm.
LETS_FN double diagonal_share(double outer, double g_hat, double unit) { return outer * (g_hat * g_hat) * unit; }
// Secant curvature H eps = g_hat - g.
LETS_FN double secant_share(double outer, double g_hat, double g) { return outer * (g_hat - g); }

}  // namespace lets

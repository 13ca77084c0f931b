// Every op of a step once on a random layout, against a plain loop over all elements: no blocks, chunks, threads or
// vectors.
//
// What an op writes must be the loop's bits, since both use the formulas of csrc/math.h (which the op tests in Python
// hold against float64); a sum must be the loop's to the rounding of a sum in double.
#pragma once

#include "loops.h"

namespace sanitize {

class EveryOp : public Loops {
 public:
  using Loops::Loops;

  void run() {
    filter_norms();
    with_type(layout_.dtype, [&](auto type) {
      using T = decltype(type);
      grad_norm<T>();
      perturb_and_restore<T>();
      sgd<T>();
      adamw<T>();
      lion<T>();
      bsam<T>();
      diagonal<T>();
      secant<T>();
    });
    all_finite();
    norms_->verify("the filter norms that were given");
    ++counts_.layouts;
  }

 private:
  void filter_norms() {
    const Dtype dtype = layout_.dtype;
    List theta = some();
    List out(random_, norms_layout_, Form::list, Values::unwritten, norms_dtype_);
    standin::op<void(const Tensors&, const Tensor&, const Tensor&)>("filter_norms")(theta.tensors, table_,
                                                                                    out.tensors[0]);
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      using C = Arithmetic<T>;
      for (size_t r = 0; r < layout_.runs.size(); ++r) {
        const Run& run = layout_.runs[r];
        std::vector<double> squares(size_t(run.filter_length > 0 ? run.filter_count : 0));
        for (int64_t i = 0; run.filter_length > 0 && i < run.numel; ++i) {
          const double x = double(lets::widen(theta.expected<T>(r)[i]));
          squares[size_t(i / run.filter_length % run.filter_count)] += x * x;
        }
        for (size_t row = 0; row < squares.size(); ++row) {
          const C found = static_cast<const C*>(out.tensors[0].data_ptr())[run.filter_start + int64_t(row)];
          const double exact = std::sqrt(squares[row]);
          check(std::fabs(double(found) - exact) <= (sizeof(C) == 8 ? double(run.numel) * 0x1p-52 : 0x1p-23) * exact,
                "filter_norms: a norm is not the plain loop's");
          out.expected<C>(0)[run.filter_start + int64_t(row)] = found;
        }
      }
    });
    theta.verify("filter_norms: params");
    out.verify("filter_norms: out");
    count(1);
  }

  template <class T>
  void grad_norm() {
    using C = Arithmetic<T>;
    List v = some(), theta = some();
    const bool given = layout_.element_wise || often(random_, 50);
    using Op = Tensor(const Tensors&, const Tensors&, const Tensor&, const MaybeTensor&, const Doubles&, double);
    const Tensor sum = standin::op<Op>("grad_norm")(v.tensors, given ? theta.tensors : Tensors{}, table_,
                                                    norms_argument_, xi_.list, q_);
    v.verify("grad_norm: vectors");
    theta.verify("grad_norm: params");
    check_sum("grad_norm", sum, [&](size_t r, int64_t i) {
      const T given_v = v.expected<T>(r)[i];
      const C x = scale(r, i, theta.expected<T>(r)[i], given_v) * C(lets::widen(given_v));
      return q_ == 2 ? double(x) * double(x) : q_ == 1 ? std::fabs(double(x)) : std::pow(std::fabs(double(x)), q_);
    });
    count(2);
  }

  template <class T>
  void perturb_and_restore() {
    using C = Arithmetic<T>;
    const bool swapped = often(random_, 30);  // the vectors stand in `saved`
    List theta = some(), v = some(), saved = flat(swapped ? Values::any : Values::unwritten);
    auto dirty = flag(0);
    auto total = number(often(random_, 10) ? 0.0 : 3.0);
    const PerRun radii = numbers({0.7, 0.05, 0.0});
    Several<double> rho(ScalarType::Double, radii.list);
    using Perturb = void(const Tensors&, const Tensors&, const Tensor&, const Tensor&, const Tensor&,
                         const MaybeTensor&, const Doubles&, double, const Tensor&, const Tensor&);
    standin::op<Perturb>("perturb_")(theta.tensors, swapped ? Tensors{} : v.tensors, saved.tensors[0], dirty.tensor,
                                     table_, norms_argument_, xi_.list, q_, total.tensor, rho.tensor);
    std::vector<lets::PerturbationScale<C>> scales;
    for (size_t r = 0; r < layout_.runs.size(); ++r)
      scales.push_back(lets::perturbation_scale<C>(total.expected(), radii.at(r), q_));
    each([&](size_t r, int64_t i) {
      const auto [factor, shrink] = scales[r];
      T& weight = theta.expected<T>(r)[i];
      const T vector = swapped ? saved.expected<T>(r)[i] : v.expected<T>(r)[i];
      saved.expected<T>(r)[i] = weight;
      if (factor == 0) return;
      const C w = lets::widen(weight), x = lets::widen(vector), t = scale(r, i, weight, vector);
      lets::narrow(w + factor * (t * lets::dual(shrink * (t * x), C(q_))), weight);
    });
    dirty.expected() = 1;
    for (const char* when : {"perturb_", "restore_"}) {
      const std::string what(when);
      theta.verify((what + ": params").c_str());
      v.verify((what + ": vectors").c_str());
      saved.verify((what + ": saved").c_str());
      dirty.verify((what + ": dirty").c_str());
      if (what == "restore_") break;
      using Restore = void(const Tensors&, const Tensor&, const Tensor&, const Tensor&);
      standin::op<Restore>("restore_")(theta.tensors, saved.tensors[0], dirty.tensor, table_);
      each([&](size_t r, int64_t i) { theta.expected<T>(r)[i] = saved.expected<T>(r)[i]; });
      dirty.expected() = 0;
    }
    total.verify("perturb_: total");
    rho.verify("perturb_: rho");
    count(3);
    count(2);
  }

  template <class T>
  void sgd() {
    using C = Arithmetic<T>;
    const bool with_momentum = often(random_, 70);
    List theta = some(), g = some(), m = some(), saved = flat(Values::any);
    auto dirty = flag(often(random_, 70));
    auto gate = number(often(random_, 80) ? 1.0 : 0.0);
    const PerRun lr = numbers({0.1, 0.02, 0.0}), weight_decay = numbers({0.05, 0.2, 0.0});
    const PerRun momentum = with_momentum ? numbers({0.9, 0.5}) : numbers({0.0});
    const struct {
      bool nesterov, maximize;
    } flags{often(random_, 50), often(random_, 50)};
    using Op = void(const Tensors&, const Tensors&, const Tensors&, const Tensor&, const Tensor&, const Tensor&,
                    const Tensor&, const Doubles&, const Doubles&, const Doubles&, bool, bool);
    standin::op<Op>("restore_sgd_")(theta.tensors, g.tensors, with_momentum ? m.tensors : Tensors{}, saved.tensors[0],
                                    dirty.tensor, table_, gate.tensor, lr.list, momentum.list, weight_decay.list,
                                    flags.nesterov, flags.maximize);
    each([&](size_t r, int64_t i) {
      const lets::Sgd<C> sgd{C(lr.at(r)), C(momentum.at(r)), C(weight_decay.at(r)), flags.nesterov, flags.maximize};
      T& weight = theta.expected<T>(r)[i];
      if (dirty.expected() != 0) weight = saved.expected<T>(r)[i];
      if (gate.expected() == 0) return;
      C next = lets::widen(m.expected<T>(r)[i]);
      const C w = lets::widen(weight), x = lets::widen(g.expected<T>(r)[i]);
      lets::narrow(lets::Sgd<C>::step(sgd, w, x, with_momentum ? &next : nullptr), weight);
      if (with_momentum) lets::narrow(next, m.expected<T>(r)[i]);
    });
    dirty.expected() = 0;
    theta.verify("restore_sgd_: params");
    g.verify("restore_sgd_: grads");
    m.verify("restore_sgd_: momenta");
    saved.verify("restore_sgd_: saved");
    dirty.verify("restore_sgd_: dirty");
    gate.verify("restore_sgd_: gate");
    count(4);
  }

  template <class T>
  void adamw() {
    using C = Arithmetic<T>;
    List theta = some(), g = some(), m = some(), v = some(Values::positive), saved = flat(Values::any);
    Layout singles;  // a step count a run, each in memory of its own
    for (size_t i = 0; i < layout_.runs.size(); ++i) singles.runs.push_back({0, 1, -1, 0, 0});
    singles.offset.resize(layout_.runs.size());
    List steps(random_, singles, often(random_, 50) ? Form::list : Form::packed, Values::positive, Dtype::float32);
    auto dirty = flag(often(random_, 70));
    auto gate = number(often(random_, 80) ? 1.0 : 0.0);
    const PerRun lr = numbers({0.01, 0.2, 0.0}), beta1 = numbers({0.9, 0.5}), beta2 = numbers({0.99, 0.7});
    const PerRun eps = numbers({1e-8, 0.1}), weight_decay = numbers({0.05, 0.2, 0.0});
    const bool decoupled = often(random_, 50), maximize = often(random_, 50);
    using Op = void(const Tensors&, const Tensors&, const Tensors&, const Tensors&, const Tensors&, const Tensor&,
                    const Tensor&, const Tensor&, const Tensor&, const Doubles&, const Doubles&, const Doubles&,
                    const Doubles&, const Doubles&, bool, bool);
    standin::op<Op>("restore_adamw_")(theta.tensors, g.tensors, m.tensors, v.tensors, steps.tensors, saved.tensors[0],
                                      dirty.tensor, table_, gate.tensor, lr.list, beta1.list, beta2.list, eps.list,
                                      weight_decay.list, decoupled, maximize);
    for (size_t r = 0; r < layout_.runs.size(); ++r) {
      float& step = *steps.expected<float>(r);
      if (gate.expected() != 0) step += 1;
      const struct {
        double lr, beta1, beta2, eps, weight_decay;
        bool decoupled, maximize;
      } options{lr.at(r), beta1.at(r), beta2.at(r), eps.at(r), weight_decay.at(r), decoupled, maximize};
      const auto adam = lets::adam_of<C>(options, double(step));
      for (int64_t i = 0; i < layout_.runs[r].numel; ++i) {
        T& weight = theta.expected<T>(r)[i];
        if (dirty.expected() != 0) weight = saved.expected<T>(r)[i];
        if (gate.expected() == 0) continue;
        C first = lets::widen(m.expected<T>(r)[i]), second = lets::widen(v.expected<T>(r)[i]);
        const C w = lets::widen(weight), x = lets::widen(g.expected<T>(r)[i]);
        lets::narrow(lets::Adam<C>::step(adam, w, x, first, second), weight);
        lets::narrow(first, m.expected<T>(r)[i]);
        lets::narrow(second, v.expected<T>(r)[i]);
      }
    }
    dirty.expected() = 0;
    theta.verify("restore_adamw_: params");
    g.verify("restore_adamw_: grads");
    m.verify("restore_adamw_: exp_avgs");
    v.verify("restore_adamw_: exp_avg_sqs");
    saved.verify("restore_adamw_: saved");
    steps.verify("restore_adamw_: steps");
    dirty.verify("restore_adamw_: dirty");
    gate.verify("restore_adamw_: gate");
    count(5);
  }

  template <class T>
  void lion() {
    using C = Arithmetic<T>;
    List theta = some(), g = some(), m = some(), saved = flat(Values::any);
    auto dirty = flag(often(random_, 70));
    auto gate = number(often(random_, 80) ? 1.0 : 0.0);
    const PerRun lr = numbers({0.1, 0.02, 0.0}), beta1 = numbers({0.9, 0.5}), beta2 = numbers({0.99, 0.7});
    const PerRun weight_decay = numbers({0.05, 0.2, 0.0});
    using Op = void(const Tensors&, const Tensors&, const Tensors&, const Tensor&, const Tensor&, const Tensor&,
                    const Tensor&, const Doubles&, const Doubles&, const Doubles&, const Doubles&);
    standin::op<Op>("restore_lion_")(theta.tensors, g.tensors, m.tensors, saved.tensors[0], dirty.tensor, table_,
                                     gate.tensor, lr.list, beta1.list, beta2.list, weight_decay.list);
    each([&](size_t r, int64_t i) {
      const lets::Lion<C> lion{C(lr.at(r)),        C(beta1.at(r)),     C(beta2.at(r)),
                               C(1 - beta1.at(r)), C(1 - beta2.at(r)), C(weight_decay.at(r))};
      T& weight = theta.expected<T>(r)[i];
      if (dirty.expected() != 0) weight = saved.expected<T>(r)[i];
      if (gate.expected() == 0) return;
      C next = lets::widen(m.expected<T>(r)[i]);
      const C w = lets::widen(weight), x = lets::widen(g.expected<T>(r)[i]);
      lets::narrow(lets::Lion<C>::step(lion, w, x, next), weight);
      lets::narrow(next, m.expected<T>(r)[i]);
    });
    dirty.expected() = 0;
    theta.verify("restore_lion_: params");
    g.verify("restore_lion_: grads");
    m.verify("restore_lion_: exp_avgs");
    saved.verify("restore_lion_: saved");
    dirty.verify("restore_lion_: dirty");
    gate.verify("restore_lion_: gate");
    count(4);
  }

  template <class T>
  void bsam() {
    using C = Arithmetic<T>;
    List theta = some(), g = some(), m = some(), s = some(Values::positive), saved = flat(Values::any);
    auto dirty = flag(often(random_, 70));
    auto gate = number(often(random_, 80) ? 1.0 : 0.0);
    const PerRun lr = numbers({0.1, 0.02, 0.0}), beta1 = numbers({0.9, 0.5}), weight_decay = numbers({0.05, 0.2, 0.0});
    using Op = void(const Tensors&, const Tensors&, const Tensors&, const Tensors&, const Tensor&, const Tensor&,
                    const Tensor&, const Tensor&, const Doubles&, const Doubles&, const Doubles&);
    standin::op<Op>("restore_bsam_")(theta.tensors, g.tensors, m.tensors, s.tensors, saved.tensors[0], dirty.tensor,
                                     table_, gate.tensor, lr.list, beta1.list, weight_decay.list);
    each([&](size_t r, int64_t i) {
      const lets::Bsam<C> bsam{C(lr.at(r)), C(beta1.at(r)), C(1 - beta1.at(r)), C(weight_decay.at(r))};
      T& weight = theta.expected<T>(r)[i];
      if (dirty.expected() != 0) weight = saved.expected<T>(r)[i];
      if (gate.expected() == 0) return;
      C next = lets::widen(m.expected<T>(r)[i]);
      const C w = lets::widen(weight), x = lets::widen(g.expected<T>(r)[i]), p = lets::widen(s.expected<T>(r)[i]);
      lets::narrow(lets::Bsam<C>::step(bsam, w, x, next, p), weight);
      lets::narrow(next, m.expected<T>(r)[i]);
    });
    dirty.expected() = 0;
    theta.verify("restore_bsam_: params");
    g.verify("restore_bsam_: grads");
    m.verify("restore_bsam_: exp_avgs");
    s.verify("restore_bsam_: precisions");
    saved.verify("restore_bsam_: saved");
    dirty.verify("restore_bsam_: dirty");
    gate.verify("restore_bsam_: gate");
    count(5);
  }

  // The four lists that both radius gradients read, and the difference that both begin with.
  struct Gradients {
    explicit Gradients(EveryOp& of)
        : val(of.some()), train(of.some()), g_hat(of.some()), v(of.some()), with_train(often(of.random_, 70)) {}
    template <class T>
    double outer(size_t r, int64_t i) {
      const double a = double(lets::widen(val.expected<T>(r)[i]));
      return with_train ? a - double(lets::widen(train.expected<T>(r)[i])) : a;
    }
    void verify(const std::string& op) {
      val.verify((op + ": val").c_str());
      train.verify((op + ": train").c_str());
      g_hat.verify((op + ": perturbed").c_str());
      v.verify((op + ": vectors").c_str());
    }
    List val, train, g_hat, v;
    bool with_train;
  };

  template <class T>
  void diagonal() {
    using C = Arithmetic<T>;
    Gradients of(*this);
    List theta = some();
    const bool given = layout_.element_wise || often(random_, 50);
    using Op = Tensor(const Tensors&, const Tensors&, const Tensors&, const Tensors&, const Tensors&, const Tensor&,
                      const MaybeTensor&, const Doubles&, double);
    const Tensor sum = standin::op<Op>("rho_grad_diagonal")(
        of.val.tensors, of.with_train ? of.train.tensors : Tensors{}, of.g_hat.tensors, of.v.tensors,
        given ? theta.tensors : Tensors{}, table_, norms_argument_, xi_.list, q_);
    of.verify("rho_grad_diagonal");
    theta.verify("rho_grad_diagonal: params");
    const bool plain = q_ == 1 || q_ == 2;
    check_sum("rho_grad_diagonal", sum, [&](size_t r, int64_t i) {
      const T vector = of.v.expected<T>(r)[i];
      const C t = scale(r, i, theta.expected<T>(r)[i], vector), x = lets::widen(vector);
      const double unit = plain ? double(t * lets::dual(t * x, C(q_))) : double(t) * lets::dual(double(t * x), q_);
      return lets::diagonal_share(of.outer<T>(r, i), double(lets::widen(of.g_hat.expected<T>(r)[i])), unit);
    });
    count(5);
  }

  template <class T>
  void secant() {
    Gradients of(*this);
    using Op = Tensor(const Tensors&, const Tensors&, const Tensors&, const Tensors&, const Tensor&);
    const Tensor sum = standin::op<Op>("rho_grad_secant")(of.val.tensors, of.with_train ? of.train.tensors : Tensors{},
                                                          of.g_hat.tensors, of.v.tensors, table_);
    of.verify("rho_grad_secant");
    check_sum("rho_grad_secant", sum, [&](size_t r, int64_t i) {
      return lets::secant_share(of.outer<T>(r, i), double(lets::widen(of.g_hat.expected<T>(r)[i])),
                                double(lets::widen(of.v.expected<T>(r)[i])));
    });
    count(4);
  }

  void all_finite() {
    auto a = number(1.0), b = number(often(random_, 50) ? 2.0 : INFINITY);
    auto skipped = flag(3);
    using Op = Tensor(const Tensors&, const Tensor&);
    const Tensor finite = standin::op<Op>("all_finite_")({a.tensor, b.tensor}, skipped.tensor);
    check(finite.memory()->at(0) == (b.expected() == 2.0 ? 1 : 0), "all_finite_ is wrong");
    skipped.expected() += b.expected() == 2.0 ? 0 : 1;
    skipped.verify("all_finite_: skipped");
    ++counts_.ops;
  }
};

}  // namespace sanitize

// What the plain loops share: a random layout, lists over it, and sums to compare.
#pragma once

#include <cmath>

#include "../../csrc/random.h"
#include "cases.h"

#include <declared.h>

namespace sanitize {

struct Counts {
  int64_t layouts = 0, ops = 0, elements = 0;
};

class Loops {
 public:
  Loops(Random& random, const Layout& layout, Counts& counts)
      : random_(random),
        layout_(layout),
        counts_(counts),
        table_(layout.table()),
        q_(one_of(random, {1.0, 2.0, 2.0, 1.5, 3.0})),
        xi_(random, layout, {0.0, 0.01, 0.3}) {
    const bool wide = layout.dtype == Dtype::float64;
    Layout norms;  // one run of arbitrary positive values: every op is tested on its own arguments
    norms.runs = {{0, layout.filters + up_to(random, 3), -1, 0, 0}};
    norms.offset = {up_to(random, 3)};
    norms_dtype_ = wide ? Dtype::float64 : Dtype::float32;
    norms_layout_ = norms;
    norms_.emplace(random, norms_layout_, Form::list, Values::positive, norms_dtype_);
    if (layout.filters > 0) norms_argument_ = norms_->tensors[0];
  }

 protected:
  using MaybeTensor = std::optional<Tensor>;
  using Doubles = std::vector<double>;

  // An op on no runs has but one form: none of its lists says a dtype.
  Form form() { return layout_.runs.empty() ? Form::list : one_of(random_, {Form::list, Form::flat, Form::packed}); }
  List some(Values values = Values::any) { return List(random_, layout_, form(), values, layout_.dtype); }
  List flat(Values values) { return List(random_, layout_, Form::flat, values, layout_.dtype); }
  PerRun numbers(std::initializer_list<double> values) { return {random_, layout_, values}; }
  void count(int lists) {
    ++counts_.ops;
    for (const Run& run : layout_.runs) counts_.elements += lists * run.numel;
  }

  template <class T>
  Arithmetic<T> scale(size_t r, int64_t i, T theta, T v) {
    using C = Arithmetic<T>;
    const Run& run = layout_.runs[r];
    if (run.filter_length == lets::kUnscaled) return C(1);
    const C xi = C(xi_.at(r));
    if (run.filter_length == lets::kFisher) return lets::fisher_scale(C(lets::widen(v)), xi);
    if (run.filter_length == lets::kElementWise) return lets::adaptive_scale(lets::absolute(lets::widen(theta)), xi);
    return lets::adaptive_scale(norms_->expected<C>(0)[run.filter_start + i / run.filter_length % run.filter_count],
                                xi);
  }
  // f(run's number, element) for all elements.
  template <class F>
  void each(F f) {
    for (size_t r = 0; r < layout_.runs.size(); ++r)
      for (int64_t i = 0; i < layout_.runs[r].numel; ++i) f(r, i);
  }
  // A sum that an op returned, against that of term(run, element): every addition may round, in either sum.
  template <class Term>
  void check_sum(const char* what, const Tensor& actual, Term term) {
    check_sum(what, actual.memory()->at(0), term);
  }
  template <class Term>
  void check_sum(const char* what, double found, Term term) {
    double sum = 0, size = 0, terms = 1;
    each([&](size_t r, int64_t i) {
      const double x = term(r, i);
      sum += x, size += std::fabs(x), ++terms;
    });
    check(std::fabs(found - sum) <= 2 * terms * 0x1p-53 * size,
          std::string(what) + " returned " + std::to_string(found) + ", the plain loop " + std::to_string(sum));
  }

  Random& random_;
  const Layout& layout_;
  Counts& counts_;
  const Tensor table_;
  const double q_;
  const PerRun xi_;
  Dtype norms_dtype_;
  Layout norms_layout_;
  std::optional<List> norms_;
  MaybeTensor norms_argument_;
};

}  // namespace sanitize

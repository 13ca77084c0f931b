// The ops that make and compare vectors, each once on a random layout, as every_op.h has those of a step.
#pragma once

#include "../../csrc/random.h"
#include "loops.h"

namespace sanitize {

class VectorOps : public Loops {
 public:
  using Loops::Loops;

  void run() {
    with_type(layout_.dtype, [&](auto type) {
      using T = decltype(type);
      dots<T>();
      displacement_dots<T>();
      combine<T>();
      average<T>();
      posterior_ascent<T>();
      noise<T>();
      masked<T>();
      count_and_select<T>();
      largest_and_peaks<T>();
    });
    norms_->verify("the filter norms that were given");
  }

 private:
  template <class T>
  static double square(T x) {
    return double(lets::widen(x)) * double(lets::widen(x));
  }
  static void check_same(const char* what, double found, double expected) {
    check(found == expected,
          std::string(what) + " returned " + std::to_string(found) + ", the plain loop " + std::to_string(expected));
  }
  bool is_open(Single<double>& gate) { return gate.expected() != 0; }
  Single<double> any_gate() { return number(often(random_, 80) ? 1.0 : 0.0); }

  // A seed, a count and a stream, of which all bits matter.
  Several<int64_t> any_random() { return {ScalarType::Long, {int64_t(random_()), int64_t(random_())}}; }
  lets::Draw draw_of(Several<int64_t>& random, uint32_t stream) {
    return {uint64_t(random.expected()[0]), uint64_t(random.expected()[1]), stream};
  }
  uint32_t word(const lets::Draw& draw, size_t r, int64_t i) {
    const int64_t position = layout_.runs[r].start + i;
    return lets::philox(draw, uint64_t(position / 4)).word[position % 4];
  }
  float normal(const lets::Draw& draw, size_t r, int64_t i) {
    const int64_t position = layout_.runs[r].start + i, first = position % 4 / 2 * 2;
    const lets::Words four = lets::philox(draw, uint64_t(position / 4));
    const lets::Pair pair = lets::normal_pair(four.word[first], four.word[first + 1]);
    return position % 2 == 0 ? pair.first : pair.second;
  }

  template <class T>
  void dots() {
    List x = some(), y = some();
    const Tensor sums =
        standin::op<Tensor(const Tensors&, const Tensors&, const Tensor&)>("dots")(x.tensors, y.tensors, table_);
    x.verify("dots: x");
    y.verify("dots: y");
    const auto product = [](T a, T b) { return double(lets::widen(a)) * double(lets::widen(b)); };
    const std::vector<double>& found = *sums.memory();
    check(found.size() >= 3, "dots returned less than three numbers");
    check_sum("dots", found[0], [&](size_t r, int64_t i) { return square(x.expected<T>(r)[i]); });
    check_sum("dots", found[1], [&](size_t r, int64_t i) { return product(x.expected<T>(r)[i], y.expected<T>(r)[i]); });
    check_sum("dots", found[2], [&](size_t r, int64_t i) { return square(y.expected<T>(r)[i]); });
    count(2);
  }

  template <class T>
  void displacement_dots() {
    using C = Arithmetic<T>;
    List g = some(), theta = some(), saved = flat(Values::any);
    using Op = Tensor(const Tensors&, const Tensors&, const Tensor&, const Tensor&);
    const Tensor sums = standin::op<Op>("displacement_dots")(g.tensors, theta.tensors, saved.tensors[0], table_);
    g.verify("displacement_dots: grads");
    theta.verify("displacement_dots: params");
    saved.verify("displacement_dots: saved");
    const auto moved = [&](size_t r, int64_t i) {
      const C now = lets::widen(theta.expected<T>(r)[i]), before = lets::widen(saved.expected<T>(r)[i]);
      return double(lets::displacement(now, before));
    };
    const std::vector<double>& found = *sums.memory();
    check(found.size() >= 3, "displacement_dots returned less than three numbers");
    check_sum("displacement_dots", found[0], [&](size_t r, int64_t i) { return square(g.expected<T>(r)[i]); });
    check_sum("displacement_dots", found[1],
              [&](size_t r, int64_t i) { return double(lets::widen(g.expected<T>(r)[i])) * moved(r, i); });
    check_sum("displacement_dots", found[2], [&](size_t r, int64_t i) { return moved(r, i) * moved(r, i); });
    count(3);
  }

  template <class T>
  void combine() {
    using C = Arithmetic<T>;
    List x = some(), y = some(), apart = some(Values::any);
    List& out = *one_of(random_, {&x, &y, &apart});
    Several<double> coefficients(ScalarType::Double, {0.3, -1.7});
    auto gate = any_gate();
    using Op = void(const Tensors&, const Tensors&, const Tensors&, const Tensor&, const Tensor&, const Tensor&);
    standin::op<Op>("combine_")(out.tensors, x.tensors, y.tensors, table_, coefficients.tensor, gate.tensor);
    if (is_open(gate)) {
      each([&](size_t r, int64_t i) {
        const C u = lets::widen(x.expected<T>(r)[i]), v = lets::widen(y.expected<T>(r)[i]);
        lets::narrow(lets::combined(C(0.3), u, C(-1.7), v), out.expected<T>(r)[i]);
      });
    }
    x.verify("combine_: x");
    y.verify("combine_: y");
    apart.verify("combine_: out");
    coefficients.verify("combine_: coefficients");
    gate.verify("combine_: gate");
    count(3);
  }

  template <class T>
  void average() {
    using C = Arithmetic<T>;
    List m = some(), x = some(), out = some(Values::unwritten);
    const bool keeps = often(random_, 50);
    auto updates = flag(often(random_, 30) ? 0 : 5);
    auto gate = any_gate();
    const double decay = 0.9, a = 1.2, b = -0.7;
    using Op = Tensor(const Tensors&, const Tensors&, const Tensors&, const Tensor&, const Tensor&, const Tensor&,
                      double, double, double);
    const Tensor sum = standin::op<Op>("average_")(m.tensors, x.tensors, keeps ? out.tensors : Tensors{},
                                                   updates.tensor, table_, gate.tensor, decay, a, b);
    const bool begins = updates.expected() == 0;
    check_sum("average_", sum, [&](size_t r, int64_t i) {
      T& average = m.expected<T>(r)[i];
      const C given = lets::widen(x.expected<T>(r)[i]), old = lets::widen(average);
      if (is_open(gate)) lets::narrow(begins ? given : lets::combined(C(decay), old, C(1 - decay), given), average);
      T v;
      lets::narrow(begins ? given : lets::combined(C(a), given, C(b), C(lets::widen(average))), v);
      if (keeps) out.expected<T>(r)[i] = v;
      return square(v);
    });
    updates.expected() += is_open(gate);
    m.verify("average_: averages");
    x.verify("average_: vectors");
    out.verify("average_: out");
    updates.verify("average_: updates");
    gate.verify("average_: gate");
    count(3);
  }

  template <class T>
  void posterior_ascent() {
    using C = Arithmetic<T>;
    List out = some(Values::unwritten), s = some(Values::positive), g = some();
    auto gate = any_gate();
    const PerRun damping = numbers({0.1, 0.7});
    using Op =
        void(const Tensors&, const Tensors&, const Tensors&, const Tensor&, const Tensor&, double, const Doubles&);
    standin::op<Op>("posterior_ascent_")(out.tensors, s.tensors, g.tensors, table_, gate.tensor, 0.99, damping.list);
    each([&](size_t r, int64_t i) {
      T& precision = s.expected<T>(r)[i];
      const C before = lets::widen(precision), x = lets::widen(g.expected<T>(r)[i]);
      lets::narrow(x / before, out.expected<T>(r)[i]);
      if (is_open(gate))
        lets::narrow(lets::precision_after(before, x, C(0.99), C(1 - 0.99), C(damping.at(r))), precision);
    });
    out.verify("posterior_ascent_: out");
    s.verify("posterior_ascent_: precisions");
    g.verify("posterior_ascent_: grads");
    gate.verify("posterior_ascent_: gate");
    count(3);
  }

  template <class T>
  void noise() {
    using C = Arithmetic<T>;
    List out = some(Values::unwritten), v = some(), s = some(Values::positive);
    const bool with_v = often(random_, 50), with_s = often(random_, 40);
    auto random = any_random();
    const uint32_t stream = uint32_t(up_to(random_, 5));
    using Op = Tensor(const Tensors&, const Tensors&, const Tensors&, const Tensor&, const MaybeTensor&, const Tensor&,
                      int64_t, double, double);
    const Tensor sum =
        standin::op<Op>("noise_")(out.tensors, with_v ? v.tensors : Tensors{}, with_s ? s.tensors : Tensors{}, table_,
                                  norms_argument_, random.tensor, stream, 0.8, 0.3);
    const lets::Draw draw = draw_of(random, stream);
    check_sum("noise_", sum, [&](size_t r, int64_t i) {
      const Run& run = layout_.runs[r];
      C scale = C(0.3);
      if (with_s) {
        scale = scale * (C(1) / lets::square_root(C(lets::widen(s.expected<T>(r)[i]))));
      } else if (run.filter_length > 0) {
        scale = scale * norms_->expected<C>(0)[run.filter_start + i / run.filter_length % run.filter_count];
      }
      const C moved = scale * C(normal(draw, r, i));
      T& to = out.expected<T>(r)[i];
      lets::narrow(with_v ? C(0.8) * C(lets::widen(v.expected<T>(r)[i])) + moved : moved, to);
      return square(to);
    });
    out.verify("noise_: out");
    v.verify("noise_: vectors");
    s.verify("noise_: precisions");
    random.verify("noise_: random");
    count(3);
  }

  template <class T>
  void masked() {
    using C = Arithmetic<T>;
    List out = some(Values::unwritten), v = some();
    Mask mask(random_, layout_);
    const bool with_mask = often(random_, 50);
    const double share = one_of(random_, {0.25, 0.6, 1.0});
    auto random = any_random();
    using Op =
        Tensor(const Tensors&, const Tensors&, const MaybeTensor&, const Tensor&, const Tensor&, int64_t, double);
    const Tensor sum = standin::op<Op>("masked_")(
        out.tensors, v.tensors, with_mask ? MaybeTensor(mask.tensor) : MaybeTensor(), table_, random.tensor, 3, share);
    const lets::Draw draw = draw_of(random, 3);
    check_sum("masked_", sum, [&](size_t r, int64_t i) {
      const T x = v.expected<T>(r)[i];
      T& to = out.expected<T>(r)[i];
      lets::narrow(C(0), to);
      if (with_mask) {
        if (mask.expected()[layout_.runs[r].start + i] != 0) to = x;
      } else if (word(draw, r, i) < lets::word_limit(share)) {
        lets::narrow(C(lets::widen(x)) * C(1 / share), to);
      }
      return square(x);
    });
    out.verify("masked_: out");
    v.verify("masked_: vectors");
    mask.verify("masked_: mask");
    random.verify("masked_: random");
    count(3);
  }

  template <class T>
  void count_and_select() {
    List v = some();
    Mask mask(random_, layout_);
    const bool with_v = often(random_, 60);
    const int64_t member = up_to(random_, 3) - 1, value = up_to(random_, 255);
    auto random = any_random();
    const lets::Draw draw = draw_of(random, 4);
    const auto key = [&](size_t r, int64_t i) {
      const uint32_t drawn = word(draw, r, i);
      return with_v ? lets::key_of(float(lets::widen(v.expected<T>(r)[i])), drawn) : lets::key_of(drawn);
    };
    // The key of an element itself is not above it.
    int64_t level = one_of(random_, {int64_t(1) << 62, int64_t(0x3F800000) << 32, int64_t(-1)});
    for (size_t r = 0; r < layout_.runs.size(); ++r)
      if (layout_.runs[r].numel > 0 && often(random_, 30)) level = key(r, up_to(random_, layout_.runs[r].numel - 1));
    auto threshold = flag(level);
    using Count = Tensor(const Tensors&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t);
    using Select =
        void(const Tensor&, const Tensors&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, int64_t);
    const Tensors vectors = with_v ? v.tensors : Tensors{};
    const Tensor found =
        standin::op<Count>("count_above")(vectors, mask.tensor, table_, threshold.tensor, random.tensor, 4, member);
    mask.verify("count_above: mask");
    standin::op<Select>("select_")(mask.tensor, vectors, table_, threshold.tensor, random.tensor, 4, member, value);
    double above = 0;
    each([&](size_t r, int64_t i) {
      uint8_t& own = mask.expected()[layout_.runs[r].start + i];
      if (key(r, i) <= threshold.expected() || (member >= 0 && own != member)) return;
      own = uint8_t(value);
      ++above;
    });
    check_same("count_above", found.memory()->at(0), above);
    mask.verify("select_: mask");
    v.verify("select_: vectors");
    threshold.verify("select_: threshold");
    random.verify("select_: random");
    count(2);
    count(2);
  }

  template <class T>
  void largest_and_peaks() {
    using C = Arithmetic<T>;
    List v = some(), out = some(Values::unwritten);
    const Tensor found = standin::op<Tensor(const Tensors&, const Tensor&)>("largest")(v.tensors, table_);
    double highest = 0;
    each(
        [&](size_t r, int64_t i) { highest = std::max(highest, std::fabs(double(lets::widen(v.expected<T>(r)[i])))); });
    check_same("largest", found.memory()->at(0), highest);
    auto height = number(often(random_, 20) ? 0.0 : highest);
    using Peaks = Tensor(const Tensors&, const Tensors&, const Tensor&, const Tensor&);
    const Tensor peaks = standin::op<Peaks>("peaks_")(out.tensors, v.tensors, table_, height.tensor);
    double all = 0;
    each([&](size_t r, int64_t i) {
      const C x = lets::widen(v.expected<T>(r)[i]);
      const bool peak = std::fabs(double(x)) == height.expected();
      all += peak;
      lets::narrow(peak ? lets::dual(x, C(1)) : C(0), out.expected<T>(r)[i]);
    });
    check_same("peaks_", peaks.memory()->at(0), all);
    v.verify("peaks_: vectors");
    out.verify("peaks_: out");
    height.verify("peaks_: largest");
    count(1);
    count(2);
  }
};

}  // namespace sanitize

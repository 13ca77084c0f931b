// A fuzz target for what checks and walks the run table and the lists (csrc/runs.h, csrc/layout.h): whatever they hold,
// an op refuses them or stays within the memory that it was given. With clang: -fsanitize=fuzzer. Otherwise the main
// below feeds it random inputs and mutations of those that got through:
//
//   fuzz [--inputs N] [--seed N]
#include <cstdio>

#include "given.h"

namespace {

using namespace sanitize;

// True if the op ran, false if it refused.
bool one(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  Given given(bytes);
  const int op = bytes.take() % 22;
  const double qs[] = {1, 1.5, 2, 2, 3, 0.5}, q = qs[bytes.take() % 6];
  Rows rows(bytes);
  rows.runs.shrink_to_fit();
  const Tensor table = given.table(rows);
  const auto number = [&](double value) { return given.scalar(ScalarType::Double, value); };
  const auto flag = [&] { return given.scalar(ScalarType::Long, int64_t(bytes.take() & 1)); };
  const auto list = [&] { return given.list(rows); };
  const auto maybe = [&] { return given.list(rows, true); };
  const auto flat = [&] { return given.vector(given.dtype(), rows.end); };
  const auto random = [&] { return given.two(ScalarType::Long, bytes.take<int64_t>(), bytes.take<int64_t>()); };
  using Maybe = std::optional<Tensor>;
  using L = const Tensors&;
  using T = const Tensor&;
  using N = const std::vector<double>&;
  const auto by_run = [&](double value) { return given.by_run(value); };
  bool ran = true;
  try {
    if (op == 0) {
      const auto out = given.norms(rows);
      if (out) standin::op<void(L, T, T)>("filter_norms")(list(), table, *out);
    } else if (op == 1) {
      standin::op<Tensor(L, L, T, const Maybe&, N, double)>("grad_norm")(list(), maybe(), table, given.norms(rows),
                                                                         by_run(0.1), q);
    } else if (op == 2) {
      standin::op<void(L, L, T, T, T, const Maybe&, N, double, T, T)>("perturb_")(
          list(), maybe(), flat(), flag(), table, given.norms(rows), by_run(0.1), q, number(2), given.radii());
    } else if (op == 3) {
      standin::op<void(L, T, T, T)>("restore_")(list(), flat(), flag(), table);
    } else if (op == 4) {
      standin::op<void(L, L, L, T, T, T, T, N, N, N, bool, bool)>("restore_sgd_")(
          list(), list(), maybe(), flat(), flag(), table, number(1), by_run(0.1), by_run(bytes.take() % 2 ? 0.9 : 0.0),
          by_run(0.01), false, false);
    } else if (op == 5) {
      standin::op<void(L, L, L, L, L, T, T, T, T, N, N, N, N, N, bool, bool)>("restore_adamw_")(
          list(), list(), list(), list(), given.numbers(rows, ScalarType::Float), flat(), flag(), table, number(1),
          by_run(0.1), by_run(0.9), by_run(0.99), by_run(1e-8), by_run(0.01), true, false);
    } else if (op == 6) {
      standin::op<void(L, L, L, L, T, T, T, T, N, N, N)>("restore_bsam_")(
          list(), list(), list(), list(), flat(), flag(), table, number(1), by_run(0.1), by_run(0.9), by_run(0.01));
    } else if (op == 7) {
      standin::op<Tensor(L, L, L, T, const Maybe&, T, int64_t, double, double)>("noise_")(
          list(), maybe(), maybe(), table, given.norms(rows), random(), 1, 0.9, 0.1);
    } else if (op == 8) {
      const Maybe mask = bytes.take() % 2 ? Maybe(given.mask(rows)) : Maybe();
      const double share = bytes.seldom() ? 0.0 : 0.5;
      standin::op<Tensor(L, L, const Maybe&, T, T, int64_t, double)>("masked_")(list(), list(), mask, table, random(),
                                                                                1, share);
    } else if (op == 9) {
      standin::op<void(T, L, T, T, T, int64_t, int64_t, int64_t)>("select_")(
          given.mask(rows), maybe(), table, flag(), random(), 1, bytes.up_to(2) - 1, bytes.up_to(260));
    } else if (op == 10) {
      standin::op<Tensor(L, L, L, T, T, T, double, double, double)>("average_")(list(), list(), maybe(), flag(), table,
                                                                                number(1), 0.9, 1.0, 0.5);
    } else if (op == 11) {
      const Tensor both = given.two(ScalarType::Double, 0.3, 0.7);
      standin::op<void(L, L, L, T, T, T)>("combine_")(list(), list(), list(), table, both, number(1));
    } else if (op == 12) {
      standin::op<Tensor(L, L, T, T)>("peaks_")(list(), list(), table, number(1));
    } else if (op == 13) {
      standin::op<Tensor(L, L, T)>("dots")(list(), list(), table);
    } else if (op == 14) {
      standin::op<Tensor(L, L, T, T)>("displacement_dots")(list(), list(), flat(), table);
    } else if (op == 15) {
      standin::op<Tensor(L, L, L, L, L, T, const Maybe&, N, double)>("rho_grad_diagonal")(
          list(), maybe(), list(), list(), maybe(), table, given.norms(rows), by_run(0.1), q);
    } else if (op == 16) {
      standin::op<Tensor(L, L, L, L, T)>("rho_grad_secant")(list(), maybe(), list(), list(), table);
    } else if (op == 17) {
      standin::op<void(L, L, L, T, T, double, N)>("posterior_ascent_")(list(), list(), list(), table, number(1), 0.9,
                                                                       by_run(0.1));
    } else if (op == 18) {
      standin::op<Tensor(L, T, T, T, T, int64_t, int64_t)>("count_above")(maybe(), given.mask(rows), table, flag(),
                                                                          random(), 1, bytes.up_to(260) - 2);
    } else if (op == 19) {
      standin::op<Tensor(L, T)>("largest")(list(), table);
    } else if (op == 20) {
      standin::op<void(L, L, L, T, T, T, T, N, N, N, N)>("restore_lion_")(list(), list(), list(), flat(), flag(), table,
                                                                          number(1), by_run(0.1), by_run(0.9),
                                                                          by_run(0.99), by_run(0.01));
    } else {
      standin::op<Tensor(L, T)>("all_finite_")(given.numbers(rows, ScalarType::Double), flag());
    }
  } catch (const standin::Refused&) {
    ran = false;
  }
  check(!ran || given.counts_fit(), "an op ran with numbers that are neither one nor one a run");
  given.verify();
  return ran;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  one(data, size);
  return 0;
}

#if !defined(LETS_LIBFUZZER)
int main(int count, char** words) {
  int64_t inputs = 10000, seed = 0;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = words[i];
    (name == "--inputs" ? inputs : seed) = std::stoll(words[i + 1]);
  }
  Random random(static_cast<uint64_t>(seed));
  std::vector<std::vector<uint8_t>> kept{std::vector<uint8_t>(64)};
  int64_t ran = 0;
  for (int64_t i = 0; i < inputs; ++i) {
    std::vector<uint8_t> input;
    if (often(random, 50)) {
      input.resize(static_cast<size_t>(16 + up_to(random, 240)));
      for (auto& byte : input) byte = uint8_t(random());
    } else {
      input = kept[size_t(up_to(random, int64_t(kept.size()) - 1))];
      for (int64_t changes = 1 + up_to(random, 3); changes > 0; --changes)
        input[size_t(up_to(random, int64_t(input.size()) - 1))] = uint8_t(random());
    }
    if (!one(input.data(), input.size())) continue;
    ++ran;
    if (kept.size() < 4096) {
      kept.push_back(input);
    } else {
      kept[size_t(up_to(random, 4095))] = input;
    }
  }
  if (inputs >= 1000 && !standin::left_out().empty()) {
    std::fprintf(stderr, "fuzz: no call of %s\n", standin::left_out().c_str());
    return 1;
  }
  std::printf("{\"inputs\": %lld, \"ran\": %lld}\n", static_cast<long long>(inputs), static_cast<long long>(ran));
}
#endif

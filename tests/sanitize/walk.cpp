// Every op on random layouts, from one caller whose op runs on several threads, or from several callers at once.
//
//   walk [--layouts N] [--threads N] [--callers N] [--isa NAME] [--long] [--seed N] [--fault NAME]
//
// Prints what it did as JSON and exits 0; or says what was wrong and exits 1. A sanitizer's report ends it otherwise.
#include <cstdio>
#include <cstring>

#include "every_op.h"
#include "faults.h"
#include "vector_ops.h"
#if !defined(LETS_EMULATED)
#include "../../csrc/isa.h"
#endif

namespace {

struct Options {
  int64_t layouts = 20, threads = 2, callers = 1, seed = 0;
  bool long_runs = false;
  std::string isa, fault;
};

Options read(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string name = words[i];
    if (name == "--long") {
      options.long_runs = true;
      continue;
    }
    sanitize::check(i + 1 < count, name + " needs a value");
    const std::string value = words[++i];
    if (name == "--layouts") {
      options.layouts = std::stoll(value);
    } else if (name == "--threads") {
      options.threads = std::stoll(value);
    } else if (name == "--callers") {
      options.callers = std::stoll(value);
    } else if (name == "--seed") {
      options.seed = std::stoll(value);
    } else if (name == "--isa") {
      options.isa = value;
    } else if (name == "--fault") {
      options.fault = value;
    } else {
      throw std::logic_error("unknown option " + name);
    }
  }
  return options;
}

void walk(const Options& options, int64_t caller, sanitize::Counts& counts) {
  sanitize::Random random(uint64_t(options.seed * 1000 + caller));
  for (int64_t i = 0; i < options.layouts; ++i) {
    for (int dtype = 0; dtype < 4; ++dtype) {
      const auto layout = sanitize::random_layout(random, lets::Dtype(dtype), options.long_runs);
      sanitize::EveryOp(random, layout, counts).run();
      sanitize::VectorOps(random, layout, counts).run();
    }
  }
}

void walk(const Options& options) {
  std::vector<sanitize::Counts> counts(static_cast<size_t>(options.callers));
  std::vector<std::string> wrong(counts.size());
  std::vector<std::thread> callers;
  for (size_t c = 0; c < counts.size(); ++c) {
    callers.emplace_back([&, c] {
      try {
        walk(options, int64_t(c), counts[c]);
      } catch (const std::exception& error) {
        wrong[c] = error.what();
      }
    });
  }
  for (auto& caller : callers) caller.join();
  sanitize::check(options.layouts == 0 || standin::left_out().empty(),
                  "every_op.h and vector_ops.h have no call of " + standin::left_out());
  sanitize::Counts all;
  for (size_t c = 0; c < counts.size(); ++c) {
    sanitize::check(wrong[c].empty(), wrong[c]);
    all.layouts += counts[c].layouts, all.ops += counts[c].ops, all.elements += counts[c].elements;
  }
  std::printf("{\"layouts\": %lld, \"ops\": %lld, \"elements\": %lld}\n", static_cast<long long>(all.layouts),
              static_cast<long long>(all.ops), static_cast<long long>(all.elements));
}

}  // namespace

int main(int count, char** words) {
  try {
    const Options options = read(count, words);
    standin::threads = int(options.threads);
#if !defined(LETS_EMULATED)
    if (!options.isa.empty()) lets::cpu::use_isa(options.isa);
#endif
    if (options.fault.empty()) {
      walk(options);
    } else {
      sanitize::commit(options.fault);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "walk: %s\n", error.what());
    return 1;
  }
  return 0;
}

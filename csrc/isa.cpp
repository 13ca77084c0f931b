#include "isa.h"

#include <stdexcept>

namespace lets::cpu {
namespace {

struct Candidate {
  const char* name;
  Kernels kernels;
};

#define LETS_TAKE(op, result) .op = op,
#define LETS_CANDIDATE(isa)                        \
  [] {                                             \
    using namespace isa;                           \
    return Candidate{#isa, {LETS_OPS(LETS_TAKE)}}; \
  }()

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> found{LETS_CANDIDATE(baseline)};
#ifdef LETS_HAVE_AVX2
    if (__builtin_cpu_supports("avx2")) found.push_back(LETS_CANDIDATE(avx2));
#endif
#ifdef LETS_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back(LETS_CANDIDATE(avx512));
#endif
    return found;
  }();
  return all;
}

const Candidate*& chosen() {
  static const Candidate* current = &candidates().back();
  return current;
}

}  // namespace

const Kernels& kernels() { return chosen()->kernels; }

std::string current_isa() { return chosen()->name; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const auto& c : candidates()) names.emplace_back(c.name);
  return names;
}

void use_isa(const std::string& name) {
  for (const auto& c : candidates()) {
    if (name == c.name) {
      chosen() = &c;
      return;
    }
  }
  std::string known;
  for (const auto& n : supported_isas()) known += (known.empty() ? "" : ", ") + n;
  throw std::invalid_argument("instruction set '" + name + "' does not run here; choose from: " + known);
}

}  // namespace lets::cpu

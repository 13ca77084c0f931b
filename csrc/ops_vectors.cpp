// The CPU registration of the ops that make and compare vectors: combinations, averages, noise, masks, peaks.
#include "chunks.h"
#include "isa.h"
#include "math.h"
#include "random.h"

namespace lets {
namespace {

Draw draw_of(const Tensor& random, int64_t stream) {
  const int64_t* numbers = random_of(random, kCpu);
  return {uint64_t(numbers[0]), uint64_t(numbers[1]), uint32_t(stream)};
}

int64_t position_of(const Table& table, const Chunk& c) { return table[c.run].start + c.begin; }

template <class F>
Tensor dots_over_chunks(const Table& table, const F& f) {
  double total[3] = {};
  for (const cpu::Dots& p : of_each_chunk<cpu::Dots>(table, f)) total[0] += p.xx, total[1] += p.xy, total[2] += p.yy;
  return make_numbers(total, 3, 1);
}

Tensor dots(const Tensors& x, const Tensors& y, const Tensor& runs) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(x, "x");
  const Runs u(x, table, dtype, kCpu, "x"), v(y, table, dtype, kCpu, "y");
  return dots_over_chunks(table, [&](const Chunk& c) { return cpu::kernels().dots(dtype, u.at(c), v.at(c), c.numel); });
}

Tensor displacement_dots(const Tensors& grads, const Tensors& params, const Tensor& saved, const Tensor& runs) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(grads, "grads");
  const Runs g(grads, table, dtype, kCpu, "grads"), theta(params, table, dtype, kCpu, "params"),
      before(Tensors{saved}, table, dtype, kCpu, "saved");
  return dots_over_chunks(table, [&](const Chunk& c) {
    return cpu::kernels().displacement_dots(dtype, g.at(c), theta.at(c), before.at(c), c.numel);
  });
}

void combine_(const Tensors& out, const Tensors& x, const Tensors& y, const Tensor& runs, const Tensor& coefficients,
              const Tensor& gate) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(out, "out");
  const Runs to(out, table, dtype, kCpu, "out"), u(x, table, dtype, kCpu, "x"), v(y, table, dtype, kCpu, "y");
  const double* numbers = coefficients_of(coefficients, kCpu);
  if (*scalar(gate, kCpu, "gate") == 0) return;
  const double a = numbers[0], b = numbers[1];
  over_chunks(table, [&](const Chunk& c) { cpu::kernels().combine(dtype, to.at(c), u.at(c), v.at(c), c.numel, a, b); });
}

Tensor average_(const Tensors& averages, const Tensors& vectors, const Tensors& out, const Tensor& updates,
                const Tensor& runs, const Tensor& gate, double decay, double a, double b) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(averages, "averages");
  const Runs m(averages, table, dtype, kCpu, "averages"), x(vectors, table, dtype, kCpu, "vectors"),
      to(out, table, dtype, kCpu, "out", Need::optional);
  int64_t& count = *counter(updates, kCpu, "updates");
  const bool go = *scalar(gate, kCpu, "gate") != 0, stream = streams(table, dtype);
  const cpu::AverageOptions options{decay, a, b, count == 0, go};
  const Tensor sum = sum_over_chunks(table, [&](const Chunk& c) {
    return cpu::kernels().average(dtype, m.at(c), x.at(c), to.at(c), c.numel, options, stream);
  });
  count += go;
  return sum;
}

void posterior_ascent_(const Tensors& out, const Tensors& precisions, const Tensors& grads, const Tensor& runs,
                       const Tensor& gate, double beta2, double damping) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(out, "out");
  const Runs to(out, table, dtype, kCpu, "out"), s(precisions, table, dtype, kCpu, "precisions"),
      g(grads, table, dtype, kCpu, "grads");
  const bool go = *scalar(gate, kCpu, "gate") != 0, stream = streams(table, dtype);
  over_chunks(table, [&](const Chunk& c) {
    cpu::kernels().posterior_ascent(dtype, to.at(c), s.at(c), g.at(c), c.numel, beta2, damping, go, stream);
  });
}

Tensor noise_(const Tensors& out, const Tensors& vectors, const Tensors& precisions, const Tensor& runs,
              const std::optional<Tensor>& filter_norms, const Tensor& random, int64_t stream, double a, double std) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(out, "out");
  const Runs to(out, table, dtype, kCpu, "out"), v(vectors, table, dtype, kCpu, "vectors", Need::optional),
      s(precisions, table, dtype, kCpu, "precisions", Need::optional);
  const Scalings scaling(table, filter_norms, dtype, 0.0, kCpu, s.empty() ? Need::required : Need::optional);
  const Draw draw = draw_of(random, stream);
  const bool around = streams(table, dtype);
  return sum_over_chunks(table, [&](const Chunk& c) {
    return cpu::kernels().noise(dtype, to.at(c), v.at(c), s.at(c), c.numel, scaling.at(c), draw, position_of(table, c),
                                a, std, around);
  });
}

Tensor masked_(const Tensors& out, const Tensors& vectors, const std::optional<Tensor>& mask, const Tensor& runs,
               const Tensor& random, int64_t stream, double share) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(out, "out");
  const Runs to(out, table, dtype, kCpu, "out"), v(vectors, table, dtype, kCpu, "vectors");
  STD_TORCH_CHECK(mask.has_value() || (share > 0 && share <= 1), "share must be above 0 and at most 1, not ", share);
  const uint8_t* own = mask.has_value() ? mask_of(*mask, table, kCpu) : nullptr;
  const Draw draw = draw_of(random, stream);
  const bool around = streams(table, dtype);
  return sum_over_chunks(table, [&](const Chunk& c) {
    const int64_t position = position_of(table, c);
    return cpu::kernels().masked(dtype, to.at(c), v.at(c), own ? own + position : nullptr, c.numel, draw, position,
                                 share, around);
  });
}

Tensor count_above(const Tensors& vectors, const Tensor& mask, const Tensor& runs, const Tensor& threshold,
                   const Tensor& random, int64_t stream, int64_t member) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(vectors, "vectors");
  const Runs v(vectors, table, dtype, kCpu, "vectors", Need::optional);
  const uint8_t* own = mask_of(mask, table, kCpu);
  check_mask_value(member, -1, "member");
  const cpu::Above above{draw_of(random, stream), *counter(threshold, kCpu, "threshold"), member};
  return sum_over_chunks(table, [&](const Chunk& c) {
    const int64_t position = position_of(table, c);
    return double(cpu::kernels().count_above(dtype, v.at(c), own + position, c.numel, position, above));
  });
}

void select_(const Tensor& mask, const Tensors& vectors, const Tensor& runs, const Tensor& threshold,
             const Tensor& random, int64_t stream, int64_t member, int64_t value) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(vectors, "vectors");
  const Runs v(vectors, table, dtype, kCpu, "vectors", Need::optional);
  uint8_t* own = mask_of(mask, table, kCpu);
  check_mask_value(member, -1, "member");
  const cpu::Above above{draw_of(random, stream), *counter(threshold, kCpu, "threshold"), member};
  check_mask_value(value, 0, "value");
  over_chunks(table, [&](const Chunk& c) {
    const int64_t position = position_of(table, c);
    cpu::kernels().select(dtype, own + position, v.at(c), c.numel, position, above, uint8_t(value));
  });
}

Tensor largest(const Tensors& vectors, const Tensor& runs) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(vectors, "vectors");
  const Runs v(vectors, table, dtype, kCpu, "vectors");
  double highest = 0;
  const auto partial =
      of_each_chunk<double>(table, [&](const Chunk& c) { return cpu::kernels().largest(dtype, v.at(c), c.numel); });
  for (double p : partial) highest = p > highest || p != p ? p : highest;  // a NaN stays
  return make_scalar(highest);
}

Tensor peaks_(const Tensors& out, const Tensors& vectors, const Tensor& runs, const Tensor& largest) {
  const Table table(runs);
  const Dtype dtype = dtype_of_list(out, "out");
  const Runs to(out, table, dtype, kCpu, "out"), v(vectors, table, dtype, kCpu, "vectors");
  const double height = *scalar(largest, kCpu, "largest");
  const bool stream = streams(table, dtype);
  return sum_over_chunks(table, [&](const Chunk& c) {
    return double(cpu::kernels().peaks(dtype, to.at(c), v.at(c), c.numel, height, stream));
  });
}

}  // namespace
}  // namespace lets

STABLE_TORCH_LIBRARY_IMPL(lets_kernels, CPU, m) {
  m.impl("dots", TORCH_BOX(&lets::dots));
  m.impl("displacement_dots", TORCH_BOX(&lets::displacement_dots));
  m.impl("combine_", TORCH_BOX(&lets::combine_));
  m.impl("average_", TORCH_BOX(&lets::average_));
  m.impl("posterior_ascent_", TORCH_BOX(&lets::posterior_ascent_));
  m.impl("noise_", TORCH_BOX(&lets::noise_));
  m.impl("masked_", TORCH_BOX(&lets::masked_));
  m.impl("count_above", TORCH_BOX(&lets::count_above));
  m.impl("select_", TORCH_BOX(&lets::select_));
  m.impl("largest", TORCH_BOX(&lets::largest));
  m.impl("peaks_", TORCH_BOX(&lets::peaks_));
}

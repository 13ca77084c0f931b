// Runs of more than 2^31 elements with no memory behind them: how they are cut, addressed, and found again.
//
// Compiled with the limits that ship and with small ones (csrc/layout.h). Prints what it looked at as JSON, or says
// what was wrong and exits 1; an overflow is UndefinedBehaviorSanitizer's to report.
#include <cstdio>

#include "../../csrc/cuda/block.h"
#include "../../csrc/isa.h"
#include "../../csrc/runs.h"
#include "cases.h"

namespace {

using namespace sanitize;
using lets::Chunk;
using lets::kChunk;

constexpr int64_t kHuge = int64_t(1) << 31;

int64_t any_size(Random& random, int64_t longest) {
  const int64_t around =
      one_of<int64_t>(random, {0, 1, 16, kChunk, 3 * kChunk, lets::cuda::kPiece, longest / 2, longest});
  return std::max<int64_t>(0, around + up_to(random, 40) - 20);
}

// The table's chunks cover every run from end to end, and each chunk of each list lies where the run table says.
int64_t cut_and_address(Random& random, int64_t longest) {
  std::vector<Run> runs;
  int64_t start = up_to(random, 2) * kHuge;
  for (int64_t i = up_to(random, 5); i >= 0; --i) {
    runs.push_back({start, any_size(random, longest), -1, 0, 0});
    start += (runs.back().numel + 15) / 16 * 16;
  }
  const int64_t end = runs.back().start + runs.back().numel;
  const Tensor rows(runs.data(), ScalarType::Long, {int64_t(runs.size()), lets::kColumns}, {lets::kColumns, 1});
  const lets::Table table(rows);
  check(table.end() == end, "Table::end");
  char* const nowhere = reinterpret_cast<char*>(uintptr_t(1) << 44);
  const lets::Where cpu;
  Tensors apart;
  for (const Run& run : runs)
    apart.emplace_back(nowhere + run.start, ScalarType::BFloat16, std::vector{run.numel}, std::vector<int64_t>{1});
  const lets::Runs flat({Tensor(nowhere, ScalarType::Double, {end}, {1})}, table, Dtype::float64, cpu, "flat"),
      list(apart, table, Dtype::bfloat16, cpu, "list");
  const bool one = runs.size() == 1;  // one run of a buffer as long is the buffer, wherever it starts
  size_t run = 0;
  int64_t next = 0;
  for (const Chunk& chunk : table.chunks()) {
    while (next == runs[run].numel) ++run, next = 0;
    check(chunk.run == int64_t(run) && chunk.begin == next && chunk.numel >= 1 && chunk.numel <= kChunk,
          "Table::chunks: a gap, an overlap or a chunk of a wrong size");
    next += chunk.numel;
    check(next <= runs[run].numel, "Table::chunks: past the end of the run");
    const int64_t first = (one && end == runs[0].numel ? 0 : runs[run].start) + chunk.begin;
    check(flat.at(chunk) == nowhere + 8 * first, "Runs::at of a flat buffer");
    check(list.at(chunk) == nowhere + runs[run].start + 2 * chunk.begin, "Runs::at of a list");
  }
  while (run < runs.size() && next == runs[run].numel) ++run, next = 0;
  check(run == runs.size(), "Table::chunks: runs without chunks");
  return table.total();
}

// What a run has beside its addresses, made of the run's number, for each kind that an op may have; and read again.
lets::cuda::Nothing made(lets::cuda::Nothing, size_t) { return {}; }
lets::cuda::Scaled made(lets::cuda::Scaled, size_t run) { return {int64_t(run), 1, nullptr, 0.0}; }
using Numbers = lets::launch_of::restore_adamw_::Each;
Numbers made(Numbers, size_t run) { return {double(run), 0.9, 0.99, 1e-8, double(run)}; }
bool is_of(lets::cuda::Nothing, size_t) { return true; }
bool is_of(const lets::cuda::Scaled& each, size_t run) { return each.filter_length == int64_t(run); }
bool is_of(const Numbers& each, size_t run) { return each.lr == double(run) && each.weight_decay == double(run); }

// The CUDA launches cover every row, none has too many chunks or bytes, and a block finds its own, with its numbers.
template <class Each>
int64_t launches(Random& random, int64_t longest) {
  constexpr int kMany = lets::cuda::kMany<Each>;
  static_assert(sizeof(lets::cuda::Batch<Each, kMany + 2>) > lets::cuda::kParameter, "there is place for more");
  std::vector<lets::cuda::Run> runs(size_t(1 + up_to(random, often(random, 30) ? 2 * kMany + 100 : 12)));
  std::vector<Each> each;
  for (auto& run : runs) {
    run = {};
    run.numel = any_size(random, longest);
    each.push_back(made(Each{}, each.size()));
  }
  size_t next = 0;
  int64_t count = 0;
  const auto chunks_of = [&](int64_t i) { return lets::cuda::pieces(runs[size_t(i)]); };
  lets::cuda::in_batches(
      runs.data(), each.data(), int64_t(runs.size()), chunks_of, [&](const auto& batch, int32_t chunks) {
        ++count;
        check(chunks >= 1 && chunks <= lets::kChunksALaunch && batch.runs <= int32_t(std::size(batch.run)),
              "a launch is too large");
        for (int32_t r = 0; r < batch.runs; ++r, ++next) {
          while (runs[next].numel == 0) ++next;
          const int64_t numel = runs[next].numel, pieces = batch.first[r + 1] - batch.first[r];
          check(batch.run[r].numel == numel && (pieces - 1) * lets::cuda::kPiece < numel &&
                    numel <= pieces * lets::cuda::kPiece,
                "a launch leaves out some of a run");
          for (const int64_t of : {int64_t(0), pieces / 2, up_to(random, pieces - 1), pieces - 1}) {
            const auto piece = lets::cuda::piece_of(batch, int32_t(batch.first[r] + of));
            check(&piece.run == &batch.run[r] && piece.begin == of * lets::cuda::kPiece &&
                      piece.begin + piece.numel <= numel &&
                      (of == pieces - 1 ? piece.begin + piece.numel == numel : piece.numel == lets::cuda::kPiece),
                  "a block takes another stretch than its own");
            check(is_of(piece.each, next), "a block takes the numbers of another run");
          }
        }
      });
  while (next < runs.size() && runs[next].numel == 0) ++next;
  check(next == runs.size(), "runs without a launch");
  return count;
}

// T of an element far into its run: the filter that the division says, in the CPU kernel and in the CUDA one.
void filters_far_into_a_run(Random& random) {
  constexpr int64_t kNumel = 2500;
  const int64_t length = 1 + up_to(random, often(random, 50) ? 40 : kHuge), count = 1 + up_to(random, 50);
  const int64_t offset = up_to(random, 8 * kHuge);
  std::vector<double> norms(static_cast<size_t>(count)), v(kNumel, 1.0);
  for (auto& norm : norms) norm = double(1 + up_to(random, 1000));
  const lets::Scaling scaling{length, count, norms.data(), 0.0, offset};
  const lets::cuda::Run run{};
  const lets::cuda::Scaled each{length, count, norms.data(), 0.0};
  const int64_t begin = offset / lets::cuda::kPiece * lets::cuda::kPiece;
  const auto scale = lets::cuda::Scale<double, true>::of({run, each, begin, 0});
  double sum = 0;
  for (int64_t i = 0; i < kNumel; ++i) {
    sum += norms[size_t((offset + i) / length % count)];
    check(lets::cuda::Scale<double, true>::filter_of(scale, int(i)) == (begin + i) / length % count,
          "Scale::filter_of");
  }
  lets::chunk_of::grad_norm chunk{};
  chunk.dtype = Dtype::float64, chunk.numel = kNumel, chunk.vectors = v.data(), chunk.scaling = scaling, chunk.q = 1;
  const double found = lets::cpu::kernels()(chunk);
  check(found == sum, "a CPU kernel took another filter's norm");  // integers: exact in any order
}

}  // namespace

int main(int count, char** words) {
  try {
    Random random(count > 1 ? std::stoull(words[1]) : 0);
    int64_t most = 0, launched = 0;
    const bool small = lets::kChunksALaunch < int64_t(1) << 20;
    // A launch takes no more of one row than it may have chunks; the CPU's chunks are a list in memory.
    const int64_t row = small ? lets::kChunksALaunch * lets::cuda::kPiece - 20 : (int64_t(1) << 43) - 20;
    for (int i = 0; i < 200; ++i) {
      if (small || i < 20) most = std::max(most, cut_and_address(random, small ? 3000 : 4 * kHuge));
      launched += launches<lets::cuda::Nothing>(random, row);
      launched += launches<lets::cuda::Scaled>(random, row) + launches<Numbers>(random, row);
      filters_far_into_a_run(random);
    }
    std::printf("{\"most_elements\": %lld, \"launches\": %lld}\n", static_cast<long long>(most),
                static_cast<long long>(launched));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "sizes: %s\n", error.what());
    return 1;
  }
  return 0;
}

// From lists of tensors to work items. All sizes and offsets are 64-bit.
#pragma once

#include <cstdint>

namespace lets {

enum class Dtype : int { float32, float64, bfloat16, float16 };

constexpr int64_t size_of(Dtype t) { return t == Dtype::float64 ? 8 : t == Dtype::float32 ? 4 : 2; }

// One row of the run table, as Python builds it (lets_kernels/space/buckets.py).
struct Run {
  int64_t start;  // offset in the flat buffers of the bucket, a multiple of 16
  int64_t numel;  //
  int64_t
      filter_length;     // kFisher, kUnscaled, kElementWise; or T is of filter (element / filter_length) % filter_count
  int64_t filter_count;  //
  int64_t filter_start;  // the run's first entry among the filter norms
};
constexpr int64_t kColumns = 5;
static_assert(sizeof(Run) == kColumns * sizeof(int64_t), "a Run is one row of the int64 table");

// A stretch of one run; sums are kept one for each chunk, so the result does not depend on the number of threads.
struct Chunk {
  int64_t run, begin, numel;
};

// Where the code takes another path for size alone. Tests make them small, so that small tensors reach those paths.
#if !defined(LETS_CHUNK)
#define LETS_CHUNK 65536
#define LETS_WORTH_A_THREAD 32768
#define LETS_NONTEMPORAL_BYTES 8388608
#define LETS_CHUNKS_A_LAUNCH 1073741824
#endif
constexpr int64_t kChunk = LETS_CHUNK;                  // elements of a chunk on the CPU
constexpr int64_t kWorthAThread = LETS_WORTH_A_THREAD;  // elements from which an op uses several threads
constexpr int64_t kNontemporalBytes =
    LETS_NONTEMPORAL_BYTES;                               // bytes written from which a CPU op writes around the caches
constexpr int64_t kChunksALaunch = LETS_CHUNKS_A_LAUNCH;  // chunks of a CUDA launch
static_assert(kChunksALaunch <= int64_t(1) << 30, "a block's index, and the next one's, are of 32 bits");

// Three sums.
struct Three {
  double first, second, third;
};

// How one chunk is scaled: T of ASAM.
struct Scaling {
  int64_t filter_length, filter_count;
  const void* norms;  // the run's filter norms, float (double for float64), or null
  double xi;
  int64_t offset;  // the chunk's first element within its run
};

// How a packed list of tensors begins (runs.h): two words that no other int64 vector has, as in
// lets_kernels/ops/native.py, and the number of a dtype.
constexpr int64_t kPacked[] = {0x6c65747353414d2b, -0x3d9b1f8a7c52e046};
constexpr int64_t kPackedWords = 3;

}  // namespace lets

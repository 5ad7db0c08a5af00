// Rows of embedding tables on a CPU, gathered or updated in one pass over the rows of a batch.
//
// `cpu_rows.py` describes both functions. The arithmetic of Adam is that of `row_optimizers.py`,
// where XLA has to make a pass for each intermediate array.
//
// A row is: embedding (D) | number of its updates (1) | mean (D) | square (D), W numbers in all.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// The compiler makes a version of a function for each kind of processor; the one that fits is
// chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("default", "arch=haswell", "avx512f")))
#else
#define FOR_EACH_PROCESSOR
#endif

constexpr int64_t kRowsPerTask = 256;  // few enough that cores end together
constexpr int64_t kRowsAhead = 8;      // that travel from memory while another one is processed
constexpr int64_t kFloatsPerCacheLine = 16;

void Prefetch(const float* row, int64_t width) {
  for (int64_t column = 0; column < width; column += kFloatsPerCacheLine) {
    __builtin_prefetch(row + column);
  }
}

// Calls `work(first, last)` for parts of [0, size), on this thread and on those of the pool that
// come in time.
template <typename Work>
void InParallel(ffi::ThreadPool& pool, int64_t size, Work work) {
  struct Tasks {
    std::atomic<int64_t> started{0};
    std::atomic<int64_t> finished{0};
  };
  const int64_t number = (size + kRowsPerTask - 1) / kRowsPerTask;
  // A thread that comes late finds no task, but it still reads the counters.
  auto tasks = std::make_shared<Tasks>();
  auto help = [tasks, number, size, work] {
    for (int64_t task; (task = tasks->started++) < number; ++tasks->finished) {
      work(task * kRowsPerTask, std::min(size, (task + 1) * kRowsPerTask));
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), number) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) {
    auto another = help;
    pool.Schedule(std::move(another));
  }
  help();
  while (tasks->finished < number) std::this_thread::yield();
}

ffi::Error Gather(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> tables, ffi::Buffer<ffi::S32> row,
                  ffi::ResultBuffer<ffi::F32> gathered) {
  const int64_t rows = tables.dimensions()[1], table_width = tables.dimensions()[2];
  const int64_t runs = gathered->dimensions()[0], ids = gathered->dimensions()[1];
  const int64_t width = gathered->dimensions()[2];
  const float* from = tables.typed_data();
  const int32_t* row_of = row.typed_data();
  float* to = gathered->typed_data();
  auto find = [=](int64_t entry) {
    return from + (entry / ids * rows + row_of[entry % ids]) * table_width;
  };
  InParallel(pool, runs * ids, [=](int64_t first, int64_t last) {
    for (int64_t entry = first; entry < last; ++entry) {
      if (entry + kRowsAhead < last) Prefetch(find(entry + kRowsAhead), width);
      std::memcpy(to + entry * width, find(entry), width * sizeof(float));
    }
  });
  return ffi::Error::Success();
}

// Computed in double precision: 1 - b2 would lose digits.
struct Adam {
  Adam(double b1, double b2, double eps)
      : b1(b1), b2(b2), rest1(1 - b1), rest2(1 - b2), log_b1(std::log(b1)), log_b2(std::log(b2)),
        eps(eps) {}

  float b1, b2, rest1, rest2, log_b1, log_b2, eps;
};

FOR_EACH_PROCESSOR
void UpdateRow(float* __restrict__ row, const float* __restrict__ gradient, int64_t width,
               Adam adam, float rate, float decay) {
  const float count = ++row[width];
  // 1 / (1 - b^count), by a function that loses no digits where the power is near 1.
  const float correct_mean = -1 / std::expm1(count * adam.log_b1);
  const float correct_square = -1 / std::expm1(count * adam.log_b2);
  float* __restrict__ mean = row + width + 1;
  float* __restrict__ square = mean + width;
  for (int64_t column = 0; column < width; ++column) {
    const float slope = gradient[column];
    mean[column] = adam.b1 * mean[column] + adam.rest1 * slope;
    square[column] = adam.b2 * square[column] + adam.rest2 * (slope * slope);
    const float step = mean[column] * correct_mean /
                       (std::sqrt(square[column] * correct_square) + adam.eps);
    row[column] -= rate * (step + decay * row[column]);
  }
}

ffi::Error UpdateByAdam(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> tables,
                        ffi::Buffer<ffi::S32> row, ffi::Buffer<ffi::S32> position,
                        ffi::Buffer<ffi::PRED> represents, ffi::Buffer<ffi::F32> gradients,
                        ffi::Buffer<ffi::F32> learning_rate, ffi::Buffer<ffi::F32> weight_decay,
                        ffi::Buffer<ffi::PRED> may_change, double b1, double b2, double eps,
                        ffi::ResultBuffer<ffi::F32> updated) {
  const int64_t rows = tables.dimensions()[1], table_width = tables.dimensions()[2];
  const int64_t runs = gradients.dimensions()[0], ids = gradients.dimensions()[1];
  const int64_t width = gradients.dimensions()[2];
  const Adam adam{b1, b2, eps};

  // XLA lets both be the same memory, unless somebody else still reads the tables.
  float* table = updated->typed_data();
  if (table != tables.typed_data()) {
    std::memcpy(table, tables.typed_data(), tables.size_bytes());
  }

  // For each representing index, a list of the indices with its row, in ascending order.
  const int32_t* position_of = position.typed_data();
  std::vector<int32_t> first_of(ids, -1), next(ids, -1);
  for (int64_t id = ids - 1; id >= 0; --id) {
    next[id] = first_of[position_of[id]];
    first_of[position_of[id]] = id;
  }

  const int32_t* row_of = row.typed_data();
  const bool* is_representing = represents.typed_data();
  const bool* is_changing = may_change.typed_data();
  const float* gradient_of = gradients.typed_data();
  const float* rate_of = learning_rate.typed_data();
  const float* decay_of = weight_decay.typed_data();
  auto find = [=](int64_t entry) {
    return table + (entry / ids * rows + row_of[entry % ids]) * table_width;
  };
  InParallel(pool, runs * ids, [=, &first_of, &next](int64_t first, int64_t last) {
    std::vector<float> sum(width);
    for (int64_t entry = first; entry < last; ++entry) {
      if (entry + kRowsAhead < last) Prefetch(find(entry + kRowsAhead), table_width);
      const int64_t run = entry / ids, id = entry % ids;
      if (!is_representing[id] || !is_changing[run]) continue;

      const float* gradient = gradient_of + (run * ids + first_of[id]) * width;
      if (next[first_of[id]] >= 0) {
        std::copy(gradient, gradient + width, sum.begin());
        for (int32_t same = first_of[id]; (same = next[same]) >= 0;) {
          const float* another = gradient_of + (run * ids + same) * width;
          for (int64_t column = 0; column < width; ++column) sum[column] += another[column];
        }
        gradient = sum.data();
      }
      if (std::all_of(gradient, gradient + width, [](float slope) { return slope == 0; })) continue;

      UpdateRow(find(entry), gradient, width, adam, rate_of[run], decay_of[run]);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kd_ranker_gather, Gather,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()    // tables [runs, rows, W]
                                  .Arg<ffi::Buffer<ffi::S32>>()    // row [M]
                                  .Ret<ffi::Buffer<ffi::F32>>());  // gathered [runs, M, D]

XLA_FFI_DEFINE_HANDLER_SYMBOL(kd_ranker_update_by_adam, UpdateByAdam,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()   // tables [runs, rows, W]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // row [M]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // position [M]
                                  .Arg<ffi::Buffer<ffi::PRED>>()  // represents [M]
                                  .Arg<ffi::Buffer<ffi::F32>>()   // gradients [runs, M, D]
                                  .Arg<ffi::Buffer<ffi::F32>>()   // learning_rate [runs]
                                  .Arg<ffi::Buffer<ffi::F32>>()   // weight_decay [runs]
                                  .Arg<ffi::Buffer<ffi::PRED>>()  // may_change [runs]
                                  .Attr<double>("b1")
                                  .Attr<double>("b2")
                                  .Attr<double>("eps")
                                  .Ret<ffi::Buffer<ffi::F32>>());  // tables, updated

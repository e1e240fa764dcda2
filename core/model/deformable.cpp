// Multi-scale deformable attention on CPUs, forward and backward (Deformable DETR, arXiv:2010.04159, eq. 3): what
// core/model/sampling.py computes with grid_sample, without ever holding a tensor of all samples. core/model/kernel.py
// builds and loads it. Plain C functions at the end; needs GCC or Clang, for their vector types.
//
// Work is cut by picture and head, so whoever runs a task owns all that it writes, and every sum runs over queries,
// levels and points in their order: results do not depend on the number of threads, to the last bit.

#include <atomic>

#include "deformable.h"

namespace {

constexpr int64_t kSmall = 1 << 14;  // samples in all that are not worth waking other threads for: some 0.1 ms

// Output (count, chunks * N) of a block: G vectors of N values at a time.
template <class T, class S, int N, int G>
void sum_cells(const Block<T>& block, const S* value, int count, int chunks, T* out, int64_t out_stride) {
  for (int r = 0; r < count; r++, out += out_stride) {
    for (int chunk = 0; chunk < chunks; chunk += G) {
      const S* cells = value + chunk * N;
      Vector<T, N> sums[4][G] = {};  // one a corner, since an addition has to wait for the one before it
      for (const Sample<T>& sample : block)
        for (int corner = 0; corner < 4; corner++)
          for (int g = 0; g < G; g++)
            sums[corner][g] += sample.share[corner][r] * load<T, N>(cells + sample.offset[corner][r] + g * N);
      for (int g = 0; g < G; g++) store(out + (chunk + g) * N, (sums[0][g] + sums[1][g]) + (sums[2][g] + sums[3][g]));
    }
  }
}

// Adds a block's part to the gradient of the values, and leaves the products of cells and `grad` in `partial`.
template <class T, class S, int N, int G>
void spread_gradient(
    const Block<T>& block, const S* value, T* grad_value, int count, int chunks, const T* grad, int64_t grad_stride) {
  for (int r = 0; r < count; r++, grad += grad_stride) {
    for (Sample<T>& sample : block) {
      Vector<T, N> dots[4] = {};
      for (int chunk = 0; chunk < chunks; chunk += G) {
        for (int g = 0; g < G; g++) {
          const int at = (chunk + g) * N;
          const Vector<T, N> slope = load<T, N>(grad + at);
          for (int corner = 0; corner < 4; corner++) {
            const auto cell = sample.offset[corner][r] + at;
            dots[corner] += slope * load<T, N>(value + cell);
            store(grad_value + cell, load<T, N>(grad_value + cell) + sample.share[corner][r] * slope);
          }
        }
      }
      for (int corner = 0; corner < 4; corner++) store(sample.partial[r][corner], fold<T, N>(dots[corner]));
    }
  }
}

// Copies rows of `dim` values that lie `from_stride` and `to_stride` apart.
template <class T, int N, class S>
void copy_rows(const S* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t dim) {
  for (int64_t i = 0; i < rows; i++, from += from_stride, to += to_stride)
    for (int64_t d = 0; d < dim; d += N) store(to + d, load<T, N>(from + d));
}

// Tasks 0 to `count`, handed out one by one to whoever asks.
struct Tasks {
  const int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  bool take(int64_t& task) { return (task = next.fetch_add(1, std::memory_order_relaxed)) < count; }
};

template <class T, class S, int N, int G>
void forward(const Sizes& z, Tasks& tasks, const S* value, const Places<const T>& places, T* out) {
  Block<T> block(z);
  const Memory own(z.packed ? sizeof(T) * z.tokens * z.dim : 1);
  if (!block.ready() || own.as<T>() == nullptr) return void(tasks.failed = true);
  for (int64_t task; tasks.take(task);) {
    const int64_t picture = task / z.heads, head = task % z.heads;
    const S* cells = value + picture * z.tokens * z.width() + head * z.dim;
    if (z.packed) copy_rows<T, N>(cells, z.width(), own.as<T>(), z.dim, z.tokens, z.dim);
    for (int64_t query = 0; query < z.queries; query += kRows) {
      const int count = int(z.queries - query < kRows ? z.queries - query : kRows), chunks = int(z.dim / N);
      block.locate(places, picture, head, query, count, false);
      T* to = out + ((picture * z.queries + query) * z.heads + head) * z.dim;
      if (z.packed) sum_cells<T, T, N, G>(block, own.as<T>(), count, chunks, to, z.width());
      else sum_cells<T, S, N, G>(block, cells, count, chunks, to, z.width());
    }
  }
}

// `grad_value` holds zeros, unless `packed`; of the other gradients every element is written.
template <class T, class S, int N, int G>
void backward(
    const Sizes& z, Tasks& tasks, const S* value, const Places<const T>& places, const T* grad, T* grad_value,
    const Places<T>& grad_places) {
  Block<T> block(z);
  const Memory own(z.packed ? 2 * sizeof(T) * z.tokens * z.dim : 1);
  if (!block.ready() || own.as<T>() == nullptr) return void(tasks.failed = true);
  T *own_value = own.as<T>(), *own_grad = own_value + (z.packed ? z.tokens * z.dim : 0);
  for (int64_t task; tasks.take(task);) {
    const int64_t picture = task / z.heads, head = task % z.heads;
    const int64_t first = picture * z.tokens * z.width() + head * z.dim;
    if (z.packed) {
      copy_rows<T, N>(value + first, z.width(), own_value, z.dim, z.tokens, z.dim);
      std::memset(own_grad, 0, sizeof(T) * z.tokens * z.dim);
    }
    for (int64_t query = 0; query < z.queries; query += kRows) {
      const int count = int(z.queries - query < kRows ? z.queries - query : kRows), chunks = int(z.dim / N);
      block.locate(places, picture, head, query, count, true);
      const T* slope = grad + ((picture * z.queries + query) * z.heads + head) * z.dim;
      if (z.packed) spread_gradient<T, T, N, G>(block, own_value, own_grad, count, chunks, slope, z.width());
      else spread_gradient<T, S, N, G>(block, value + first, grad_value + first, count, chunks, slope, z.width());
      block.differentiate(grad_places, picture, head, query, count);
    }
    if (z.packed) copy_rows<T, N>(own_grad, z.dim, grad_value + first, z.width(), z.tokens, z.dim);
  }
}

using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
Parallel parallel = nullptr;

// Runs `work(tasks)` in as many threads as there is work for, each until no task is left.
template <class Work>
int run(const Sizes& z, int threads, const Work& work) {
  Tasks tasks{z.batch * z.heads};
  if (tasks.count * z.queries * z.row() == 0) return 0;
  if (threads > tasks.count) threads = int(tasks.count);
  if (threads <= 1 || parallel == nullptr || tasks.count * z.queries * z.row() < kSmall) {
    work(tasks);
  } else {
    struct Shared {
      const Work& work;
      Tasks& tasks;
    } shared{work, tasks};
    parallel([](void* data) { static_cast<Shared*>(data)->work(static_cast<Shared*>(data)->tasks); }, &shared,
             unsigned(threads), 0);
  }
  return tasks.failed ? 1 : 0;
}

// Calls `work` with the widest vectors of T that a head's values fill, and how many of them at a time.
template <class T, class Work>
int with_vectors(int64_t dim, const Work& work) {
  constexpr int N = kLanes<T>;
  const auto call = [&](auto lanes, auto group) { return work(lanes, group); };
  if (dim % (4 * N) == 0) return call(std::integral_constant<int, N>{}, std::integral_constant<int, 4>{});
  if (dim % (2 * N) == 0) return call(std::integral_constant<int, N>{}, std::integral_constant<int, 2>{});
  if (dim % N == 0) return call(std::integral_constant<int, N>{}, std::integral_constant<int, 1>{});
  if constexpr (N > 8)
    if (dim % 8 == 0) return call(std::integral_constant<int, 8>{}, std::integral_constant<int, 1>{});
  return call(std::integral_constant<int, 4>{}, std::integral_constant<int, 1>{});
}

}  // namespace

// `dim` is a multiple of 4, every level has cells, `tokens` is their number, and tokens * heads * dim fits 31 bits.
// `grad_reference` (B, M, Q, L, 2 or 4) is each head's own part, or null. Return 0, or 1 when there is no memory.
#define DEFORMABLE(NAME, T, S)                                                                                       \
  extern "C" int forward_##NAME(                                                                                     \
      const Sizes* sizes, int threads, const S* value, const T* places, const T* weights, const T* reference,        \
      T* out) {                                                                                                      \
    return with_vectors<T>(sizes->dim, [&](auto lanes, auto group) {                                                 \
      return run(*sizes, threads, [&](Tasks& tasks) {                                                                \
        forward<T, S, lanes(), group()>(*sizes, tasks, value, {places, weights, reference}, out);                    \
      });                                                                                                            \
    });                                                                                                              \
  }                                                                                                                  \
  extern "C" int backward_##NAME(                                                                                    \
      const Sizes* sizes, int threads, const S* value, const T* places, const T* weights, const T* reference,        \
      const T* grad, T* grad_value, T* grad_places, T* grad_weights, T* grad_reference) {                            \
    return with_vectors<T>(sizes->dim, [&](auto lanes, auto group) {                                                 \
      return run(*sizes, threads, [&](Tasks& tasks) {                                                                \
        backward<T, S, lanes(), group()>(*sizes, tasks, value, {places, weights, reference}, grad, grad_value,       \
                                         {grad_places, grad_weights, grad_reference});                               \
      });                                                                                                            \
    });                                                                                                              \
  }

DEFORMABLE(float32, float, float)
DEFORMABLE(bfloat16, float, BFloat16)
DEFORMABLE(float64, double, double)

// Threads come from the OpenMP library that the process has loaded already: its `GOMP_parallel`.
extern "C" void use_threads_of(Parallel gomp_parallel) { parallel = gomp_parallel; }

// Where the samples of deformable attention lie and what each cell's share is, many samples at a time; and back again,
// for the gradients. Written in vectors of GCC and Clang, which every processor has some of.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>

namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class T>
constexpr int kLanes = kRegisterBytes / sizeof(T) < 4 ? 4 : kRegisterBytes / sizeof(T);

constexpr int kRows = 16;  // queries whose samples are located at a time: vectors run over them

#define INLINE inline __attribute__((always_inline))

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;
template <class T>
using IntegerOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

struct BFloat16 {
  uint16_t bits;
};

template <class T, int N, class S>
INLINE Vector<T, N> load(const S* from) {
  if constexpr (std::is_same_v<S, BFloat16>) {  // the upper half of a float
    Vector<uint16_t, N> bits;
    std::memcpy(&bits, from, sizeof(bits));
    return (Vector<T, N>)(__builtin_convertvector(bits, Vector<uint32_t, N>) << 16);
  } else {
    Vector<T, N> values;
    std::memcpy(&values, from, sizeof(values));
    return values;
  }
}

template <class T, class V>
INLINE void store(T* to, V values) {
  std::memcpy(to, &values, sizeof(values));
}

// Adds halves until four partial sums are left.
template <class T, int N>
INLINE Vector<T, 4> fold(Vector<T, N> values) {
  if constexpr (N == 4) {
    return values;
  } else {
    Vector<T, N / 2> halves[2];
    std::memcpy(halves, &values, sizeof(values));
    return fold<T, N / 2>(halves[0] + halves[1]);
  }
}

// exp of what is at most 0, to some 2 units in the last place; too small is 0.
template <class T, int N>
INLINE Vector<T, N> exponential(Vector<T, N> power) {
  Vector<T, N> result;
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < N; i++) result[i] = std::exp(power[i]);
  } else {
    const Vector<T, N> x = power > -87.0f ? power : Vector<T, N>{} - 87.0f;
    const auto whole = __builtin_convertvector(x * 1.44269504f - 0.5f, Vector<int32_t, N>);  // of its factors 2
    const auto n = __builtin_convertvector(whole, Vector<T, N>);
    const auto rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // the natural logarithm of 2, in two parts
    auto series = rest * (1.0f / 5040) + 1.0f / 720;
    for (const float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) series = series * rest + term;
    result = series * (Vector<T, N>)((whole + 127) << 23);
  }
  return power == power ? result : power;
}

// In the order in which Python fills them; (height, width) of each level follow.
struct Sizes {
  int64_t batch, tokens, heads, dim, queries, levels, points;
  int64_t reference;  // numbers of a reference: 0, or 2 for a point, 4 for a box
  int64_t packed;     // whether each head's values are first copied side by side: pays when many samples share a cell
  int64_t shapes[];

  int64_t row() const { return levels * points; }
  int64_t width() const { return heads * dim; }
  int64_t stride() const { return packed ? dim : width(); }  // from a token to the next
};

// Memory in pieces that start on cache lines.
class Memory {
 public:
  explicit Memory(size_t bytes) {
    if (posix_memalign(&start_, 64, bytes) != 0) start_ = nullptr;
  }
  ~Memory() { std::free(start_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(start_);  // null where there is no memory
  }

 private:
  void* start_ = nullptr;
};

// One coordinate of a sample, in cells: the two cells that it lies between, and their shares; none outside the level.
template <class T, int N>
struct Axis {
  using V = Vector<T, N>;
  using I = Vector<IntegerOf<T>, N>;

  V low, high;              // shares of the two cells
  I first, second;          // the cells; inside the level also where their share is zero
  I has_first, has_second;  // masks

  INLINE Axis(V place, T size) {
    const V zero = {}, beyond = zero + (size + T(1)), last = zero + (size - T(1));
    V near = place > T(-2) ? place : zero - T(2);  // far away is as good as just outside; so is what is no number
    near = near < beyond ? near : beyond;
    V floor = __builtin_convertvector(__builtin_convertvector(near, I), V);
    floor = floor > near ? floor - T(1) : floor;
    const V next = floor + T(1);
    has_first = (floor >= zero) & (floor <= last);
    has_second = (next >= zero) & (next <= last);
    low = keep(next - near, has_first);
    high = keep(near - floor, has_second);
    first = inside(floor, last);
    second = inside(next, last);
  }

  static INLINE V keep(V values, I mask) { return (V)((I)values & mask); }

  static INLINE I inside(V cell, V last) {
    const V zero = {};
    const V least = cell > zero ? cell : zero;
    return __builtin_convertvector(least < last ? least : last, I);
  }
};

// What says where to sample and how much it counts: locations and weights; or offsets and logits, with references.
template <class T>
struct Places {
  T *place, *weight, *reference;  // (B, Q, M, L, P, 2), (B, Q, M, L, P), and (B, Q, L, 2 or 4) or null
};

// Of up to kRows consecutive queries of one head: sample (level, point) of each. Corners: (row, column) = 00 01 10 11.
template <class T>
struct Sample {
  T place[2][kRows];  // x and y as given; `differentiate` leaves its gradient here
  T weight[kRows];    // of attention; a logit at first
  T grad_weight[kRows];
  IntegerOf<T> offset[4][kRows];  // of each corner, from the head's first value
  T share[4][kRows];              // of each corner, times the attention weight
  T partial[kRows][4][4];         // corners: four partial sums of the product of a cell and the output's gradient
};

// Of the same queries, what their samples on one level have in common.
template <class T>
struct Level {
  T size[2];           // width, height
  IntegerOf<T> start;  // offset of its first cell
  T anchor[4][kRows];  // the references: x, y, and a box's width and height
  T grad_anchor[4][kRows];
};

template <class T>
class Block {
  static constexpr int N = kLanes<T>;
  using V = Vector<T, N>;
  using Int = IntegerOf<T>;
  using I = Vector<Int, N>;

 public:
  explicit Block(const Sizes& sizes)
      : z(sizes), samples_(sizeof(Sample<T>) * z.row()), levels_(sizeof(Level<T>) * z.levels) {
    if (!ready()) return;
    std::memset(begin(), 0, sizeof(Sample<T>) * z.row());
    std::memset(levels(), 0, sizeof(Level<T>) * z.levels);
    for (int64_t level = 0, first = 0; level < z.levels; level++) {
      const int64_t height = z.shapes[2 * level], width = z.shapes[2 * level + 1];
      levels()[level].size[0] = T(width), levels()[level].size[1] = T(height);
      levels()[level].start = Int(first * z.stride());
      first += height * width;
    }
  }

  bool ready() const { return begin() != nullptr && levels() != nullptr; }
  Sample<T>* begin() const { return samples_.template as<Sample<T>>(); }
  Sample<T>* end() const { return begin() + z.row(); }

  // Find `offset` and `share` for `count` queries from `query` of a picture and head. A sample whose place is not finite
  // has shares that are no number, so that its output is none; with `gradient` it gives nothing, as it lies in no cell.
  void locate(const Places<const T>& from, int64_t picture, int64_t head, int64_t query, int count, bool gradient) {
    read(from, picture, head, query, count);
    if (z.reference) softmax();
    const Int stride = Int(z.stride());
    each_vector([&](Level<T>& level, Sample<T>& sample, int r) __attribute__((always_inline)) {
      const V x = place(level, sample, 0, r), y = place(level, sample, 1, r);
      const Axis<T, N> across(x, level.size[0]), down(y, level.size[1]);
      const Int step = Int(level.size[0]) * stride;
      const I top = level.start + down.first * step, bottom = level.start + down.second * step;
      const I left = across.first * stride, right = across.second * stride;
      store(sample.offset[0] + r, top + left), store(sample.offset[1] + r, top + right);
      store(sample.offset[2] + r, bottom + left), store(sample.offset[3] + r, bottom + right);
      V weight = load<T, N>(sample.weight + r);
      if (!gradient) weight += (x - x) + (y - y);
      const V upper = down.low * weight, lower = down.high * weight;
      store(sample.share[0] + r, upper * across.low), store(sample.share[1] + r, upper * across.high);
      store(sample.share[2] + r, lower * across.low), store(sample.share[3] + r, lower * across.high);
    });
  }

  // After `locate` and with `partial` filled: write the gradients of places and weights, and each head's of references.
  void differentiate(const Places<T>& to, int64_t picture, int64_t head, int64_t query, int count) {
    for (int64_t l = 0; l < z.levels; l++) std::memset(levels()[l].grad_anchor, 0, sizeof(levels()[l].grad_anchor));
    each_vector([&](Level<T>& level, Sample<T>& sample, int r) __attribute__((always_inline)) {
      const V x = place(level, sample, 0, r), y = place(level, sample, 1, r);
      const Axis<T, N> across(x, level.size[0]), down(y, level.size[1]);
      V d[4];  // products of the four cells with the output's gradient
      for (int corner = 0; corner < 4; corner++) {
        const auto sum = [&](int row) {
          const T* parts = sample.partial[r + row][corner];
          return (parts[0] + parts[1]) + (parts[2] + parts[3]);
        };
        for (int row = 0; row < N; row++) d[corner][row] = sum(row);
      }
      d[0] = across.keep(d[0], down.has_first & across.has_first);
      d[1] = across.keep(d[1], down.has_first & across.has_second);
      d[2] = across.keep(d[2], down.has_second & across.has_first);
      d[3] = across.keep(d[3], down.has_second & across.has_second);
      const V weight = load<T, N>(sample.weight + r), no_number = (x - x) + (y - y);
      const V upper = across.low * d[0] + across.high * d[1], lower = across.low * d[2] + across.high * d[3];
      store(sample.grad_weight + r, down.low * upper + down.high * lower + no_number);
      const V slope_x = down.low * (d[1] - d[0]) + down.high * (d[3] - d[2]);
      const V slope_y = across.low * (d[2] - d[0]) + across.high * (d[3] - d[1]);
      give_back(level, sample, 0, r, slope_x * weight * level.size[0] + no_number);
      give_back(level, sample, 1, r, slope_y * weight * level.size[1] + no_number);
    });
    if (z.reference) differentiate_softmax();
    write(to, picture, head, query, count);
  }

  const Sizes& z;

 private:
  Level<T>* levels() const { return levels_.template as<Level<T>>(); }

  template <class Work>
  INLINE void each_vector(const Work& work) {
    Sample<T>* sample = begin();
    for (Level<T>* level = levels(); level < levels() + z.levels; level++)
      for (int64_t point = 0; point < z.points; point++, sample++)
        for (int r = 0; r < kRows; r += N) work(*level, *sample, r);
  }

  // A sample's place along an axis (0 is x), in cells from the centre of the first.
  INLINE V place(const Level<T>& level, const Sample<T>& sample, int axis, int r) const {
    const V given = load<T, N>(sample.place[axis] + r);
    const T size = level.size[axis];
    if (z.reference == 0) return given * size - T(0.5);
    const V centre = load<T, N>(level.anchor[axis] + r);
    if (z.reference == 2) return centre * size + given - T(0.5);
    return (centre + given * load<T, N>(level.anchor[axis + 2] + r) * reach()) * size - T(0.5);
  }

  // From the gradient of a location to those of what it was made of.
  INLINE void give_back(Level<T>& level, Sample<T>& sample, int axis, int r, V slope) const {
    T* place = sample.place[axis] + r;
    if (z.reference == 0) return store(place, slope);
    const auto add = [](T* to, V what) { store(to, load<T, N>(to) + what); };
    add(level.grad_anchor[axis] + r, slope);
    if (z.reference == 2) return store(place, slope / level.size[axis]);
    add(level.grad_anchor[axis + 2] + r, slope * load<T, N>(place) * reach());
    store(place, slope * load<T, N>(level.anchor[axis + 2] + r) * reach());
  }

  T reach() const { return T(0.5) / T(z.points); }  // an offset of P reaches half the side of a box

  void softmax() {
    for (int r = 0; r < kRows; r += N) {
      V largest = load<T, N>(begin()->weight + r), sum = {};
      for (const Sample<T>& sample : *this) {
        const V logit = load<T, N>(sample.weight + r);
        largest = largest > logit ? largest : logit;
      }
      for (Sample<T>& sample : *this) {
        const V power = exponential<T, N>(load<T, N>(sample.weight + r) - largest);
        sum += power;
        store(sample.weight + r, power);
      }
      const V factor = T(1) / sum;
      for (Sample<T>& sample : *this) store(sample.weight + r, load<T, N>(sample.weight + r) * factor);
    }
  }

  void differentiate_softmax() {
    for (int r = 0; r < kRows; r += N) {
      V mean = {};
      for (Sample<T>& sample : *this) mean += load<T, N>(sample.weight + r) * load<T, N>(sample.grad_weight + r);
      for (Sample<T>& sample : *this) {
        const V weight = load<T, N>(sample.weight + r);
        store(sample.grad_weight + r, weight * (load<T, N>(sample.grad_weight + r) - mean));
      }
    }
  }

  void read(const Places<const T>& from, int64_t picture, int64_t head, int64_t query, int count) {
    for (int r = 0; r < count; r++) {
      const int64_t asked = picture * z.queries + query + r, at = (asked * z.heads + head) * z.row();
      const T *place = from.place + 2 * at, *weight = from.weight + at;
      for (Sample<T>& sample : *this) {
        sample.place[0][r] = *place++, sample.place[1][r] = *place++;
        sample.weight[r] = *weight++;
      }
      if (z.reference == 0) continue;
      const T* reference = from.reference + asked * z.levels * z.reference;
      for (Level<T>* level = levels(); level < levels() + z.levels; level++)
        for (int64_t i = 0; i < z.reference; i++) level->anchor[i][r] = *reference++;
    }
  }

  void write(const Places<T>& to, int64_t picture, int64_t head, int64_t query, int count) const {
    for (int r = 0; r < count; r++) {
      const int64_t at = ((picture * z.queries + query + r) * z.heads + head) * z.row();
      T *place = to.place + 2 * at, *weight = to.weight + at;
      for (const Sample<T>& sample : *this) {
        *place++ = sample.place[0][r], *place++ = sample.place[1][r];
        *weight++ = sample.grad_weight[r];
      }
      if (to.reference == nullptr) continue;
      const int64_t own = (picture * z.heads + head) * z.queries + query + r;  // (B, M, Q, L, 2 or 4)
      T* reference = to.reference + own * z.levels * z.reference;
      for (const Level<T>* level = levels(); level < levels() + z.levels; level++)
        for (int64_t i = 0; i < z.reference; i++) *reference++ = level->grad_anchor[i][r];
    }
  }

  const Memory samples_, levels_;
};

}  // namespace

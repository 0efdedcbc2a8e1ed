// Loops over one chunk. Included once per instruction set, inside a namespace of its own, under that set's target options.
// The includer defines SAM_FUSED_ISA_NAME; nothing outside this file differs between the compilations.
//
// Values travel in blocks of kBlock elements: a role stored in the arithmetic's type is read and written in place, any other
// is converted through a buffer in the first-level cache. So every mix of dtypes runs the same inner loops, and the compiler
// vectorises those.

constexpr int64_t kBlock = 512;

// ---- conversions ----------------------------------------------------------------------------------------------------

template <class T>
void widen_float16(const uint16_t* from, T* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (sizeof(T) == 4) {
    for (; i + 8 <= n; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
    }
  }
#endif
  for (; i < n; ++i) to[i] = from_float16(from[i]);
}

template <class T>
void narrow_float16(const T* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (sizeof(T) == 4) {
    for (; i + 8 <= n; i += 8) {
      const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
    }
  }
#endif
  for (; i < n; ++i) to[i] = to_float16(static_cast<float>(from[i]));
}

// ---- reading and writing a block --------------------------------------------------------------------------------------

inline char* at(const TensorRow& row, Role role, int64_t element) {
  return static_cast<char*>(row.address[role]) + element * size_of(row.dtype(role));
}

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
}

// The block's values as T: the memory itself when it holds T, else the converted copy in `buffer`.
template <class T>
const T* load(const TensorRow& row, Role role, int64_t element, int64_t n, T* buffer) {
  const char* from = at(row, role, element);
  const DType dtype = row.dtype(role);
  if (dtype == dtype_of<T>()) return reinterpret_cast<const T*>(from);
  switch (dtype) {
    case DType::kFloat32:
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(reinterpret_cast<const float*>(from)[i]);
      break;
    case DType::kFloat64:
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<T>(reinterpret_cast<const double*>(from)[i]);
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i) buffer[i] = from_bfloat16(reinterpret_cast<const uint16_t*>(from)[i]);
      break;
    case DType::kFloat16:
      widen_float16(reinterpret_cast<const uint16_t*>(from), buffer, n);
      break;
  }
  return buffer;
}

// Bytes written past the caches. The ragged ends, and machines without such stores, are copied.
inline void stream_bytes(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  constexpr int64_t kWide = 64;
#elif defined(__AVX__)
  constexpr int64_t kWide = 32;
#else
  constexpr int64_t kWide = 16;
#endif
  const int64_t head = (kWide - static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kWide)) % kWide;
  if (head < bytes) {
    __builtin_memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= kWide; bytes -= kWide, to += kWide, from += kWide) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
      _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
    }
  }
#endif
  __builtin_memcpy(to, from, bytes);
}

inline void write_bytes(char* to, const char* from, int64_t bytes, bool stream) {
  if (stream) stream_bytes(to, from, bytes);
  else __builtin_memcpy(to, from, bytes);
}

// Where to compute a block of results: the memory itself, or `buffer` when it must be converted or streamed.
template <class T>
T* target(const TensorRow& row, Role role, int64_t element, T* buffer, bool stream) {
  return row.dtype(role) == dtype_of<T>() && !stream ? reinterpret_cast<T*>(at(row, role, element)) : buffer;
}

template <class T>
void store(const TensorRow& row, Role role, int64_t element, int64_t n, const T* values, bool stream) {
  char* to = at(row, role, element);
  const DType dtype = row.dtype(role);
  if (reinterpret_cast<const char*>(values) == to) return;
  if (dtype == dtype_of<T>()) return write_bytes(to, reinterpret_cast<const char*>(values), n * sizeof(T), stream);
  alignas(64) char narrow[kBlock * 8];
  switch (dtype) {
    case DType::kFloat32:
      for (int64_t i = 0; i < n; ++i) reinterpret_cast<float*>(narrow)[i] = static_cast<float>(values[i]);
      break;
    case DType::kFloat64:
      for (int64_t i = 0; i < n; ++i) reinterpret_cast<double*>(narrow)[i] = static_cast<double>(values[i]);
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i) reinterpret_cast<uint16_t*>(narrow)[i] = to_bfloat16(static_cast<float>(values[i]));
      break;
    case DType::kFloat16:
      narrow_float16(values, reinterpret_cast<uint16_t*>(narrow), n);
      break;
  }
  write_bytes(to, narrow, n * size_of(dtype), stream);
}

template <class F>
void for_each_block(const Chunk& chunk, F f) {
  const int64_t end = chunk.begin + chunk.count;
  for (int64_t element = chunk.begin; element < end; element += kBlock) {
    f(element, end - element < kBlock ? end - element : kBlock);
  }
}

// fp64 weights are computed in fp64, everything else in fp32: f gets a value of the type.
template <class F>
void with_arithmetic_type(const TensorRow& row, F f) {
  if (row.dtype(kWeight) == DType::kFloat64) f(double{});
  else f(float{});
}

// The block's gradient: with an accumulator in the row, what was accumulated plus the weighted gradient, in `buffer`.
template <class T>
const T* load_gradient(const TensorRow& row, int64_t element, int64_t n, double weight, T* buffer) {
  const T* g = load(row, kGrad, element, n, buffer);
  if (row.address[kAccumulator] == nullptr) return g;
  alignas(64) T sum_buffer[kBlock];
  const T* sum = load(row, kAccumulator, element, n, sum_buffer);
  const T w = static_cast<T>(weight);
  SAM_FUSED_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) buffer[i] = accumulated(sum[i], g[i], w);
  return buffer;
}

// ---- the sum of squares -----------------------------------------------------------------------------------------------

// A fixed number of lanes, added in a fixed tree: the same bits from every instruction set.
constexpr int64_t kLanes = 32;

inline double sum_of_lanes(const double* lanes) {
  double sums[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) sums[i] = lanes[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

// sum + x * x for an x that was fp32: the product is exact in fp64, so with and without a fused instruction the same bits.
inline double plus_square(double sum, double x) {
#if defined(__FMA__)
  return __builtin_fma(x, x, sum);
#else
  return sum + x * x;
#endif
}

// Adds the squares of n values. A product of two fp32 values is exact in fp64 and its square is not, hence kProducts.
template <bool kProducts>
struct ExactSquares {
  double middle[kLanes] = {};

  static double added(double sum, double x) { return kProducts ? sum + x * x : plus_square(sum, x); }

  template <class ValueAt>
  void add(int64_t n, ValueAt value_at) {
    double sums[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] = middle[lane];
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sums[lane] = added(sums[lane], value_at(i + lane));
      }
    }
    for (int64_t lane = 0; i < n; ++i, ++lane) sums[lane] = added(sums[lane], value_at(i));
    for (int64_t lane = 0; lane < kLanes; ++lane) middle[lane] = sums[lane];
  }

  SumOfSquares total() const { return {0, sum_of_lanes(middle), 0}; }
};

// Squares of fp64 values may overflow or vanish, see squares.h. A block without such values, as nearly every one is, adds to
// `middle` in the same order without looking at each.
struct ScaledSquares {
  double small[kLanes] = {}, middle[kLanes] = {}, big[kLanes] = {};

  template <class ValueAt>
  void add(int64_t n, ValueAt value_at) {
    alignas(64) double values[kBlock];
    int64_t outside = 0;
    for (int64_t i = 0; i < n; ++i) {
      values[i] = value_at(i);
      const double size = __builtin_fabs(values[i]);
      outside += int64_t(size > kBigValue) + (int64_t(size < kSmallValue) & int64_t(size != 0));
    }
    if (outside == 0) {
      ExactSquares<true> plain;
      for (int64_t lane = 0; lane < kLanes; ++lane) plain.middle[lane] = middle[lane];
      plain.add(n, [&values](int64_t i) { return values[i]; });
      for (int64_t lane = 0; lane < kLanes; ++lane) middle[lane] = plain.middle[lane];
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t lane = i % kLanes;
      SumOfSquares sum{small[lane], middle[lane], big[lane]};
      add_square(sum, values[i]);
      small[lane] = sum.small, middle[lane] = sum.middle, big[lane] = sum.big;
    }
  }

  SumOfSquares total() const { return {sum_of_lanes(small), sum_of_lanes(middle), sum_of_lanes(big)}; }
};

inline bool is_adaptive(const TensorRow& row) { return static_cast<Scaling>(row.scaling) == Scaling::kAbsWeight; }

template <class T, class Accumulator>
SumOfSquares chunk_sum_of_squares(const TensorRow& row, const Chunk& chunk, double weight, double inv_scale) {
  Accumulator accumulator;
  const bool adaptive = is_adaptive(row);
  for_each_block(chunk, [&](int64_t element, int64_t n) {
    alignas(64) T g_buffer[kBlock], w_buffer[kBlock];
    const T* g = load_gradient(row, element, n, weight, g_buffer);
    if (inv_scale != 1.0) {
      // Scaling before squaring: what overflows unscaled need not overflow scaled, and the other way round.
      for (int64_t i = 0; i < n; ++i) g_buffer[i] = g[i] * static_cast<T>(inv_scale);
      g = g_buffer;
    }
    if (adaptive) {
      const T* w = load(row, kWeight, element, n, w_buffer);
      accumulator.add(n, [w, g](int64_t i) { return static_cast<double>(w[i]) * static_cast<double>(g[i]); });
    } else {
      accumulator.add(n, [g](int64_t i) { return static_cast<double>(g[i]); });
    }
  });
  return accumulator.total();
}

void sum_of_squares(const TensorRow& row, const Chunk& chunk, double weight, double inv_scale, SumOfSquares* slot) {
  if (row.dtype(kGrad) == DType::kFloat64) *slot = chunk_sum_of_squares<double, ScaledSquares>(row, chunk, weight, inv_scale);
  else if (is_adaptive(row)) *slot = chunk_sum_of_squares<float, ExactSquares<true>>(row, chunk, weight, inv_scale);
  else *slot = chunk_sum_of_squares<float, ExactSquares<false>>(row, chunk, weight, inv_scale);
}

// ---- perturb and restore ----------------------------------------------------------------------------------------------

void restore(const TensorRow& row, const Chunk& chunk, bool stream) {
  if (row.address[kWeight] == row.address[kBackup]) return;
  const int64_t size = size_of(row.dtype(kWeight));
  write_bytes(at(row, kWeight, chunk.begin), at(row, kBackup, chunk.begin), chunk.count * size, stream);
}

// The inner loops take their constants by value: one that a store might change could not stay in a register.
template <class T>
void perturb_loop(const T* w, const T* g, T* out, int64_t n, T c, bool adaptive) {
  if (adaptive) {
    SAM_FUSED_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) out[i] = perturbed_adaptive(w[i], g[i], c);
  } else {
    SAM_FUSED_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) out[i] = perturbed(w[i], g[i], c);
  }
}

template <class T>
void perturb_chunk(const TensorRow& row, const Chunk& chunk, const PerturbConstants& k) {
  const bool adaptive = is_adaptive(row);
  const int64_t size = size_of(row.dtype(kWeight));
  for_each_block(chunk, [&](int64_t element, int64_t n) {
    alignas(64) T g_buffer[kBlock], w_buffer[kBlock], result[kBlock];
    if (!k.backup_exists) write_bytes(at(row, kBackup, element), at(row, kWeight, element), n * size, k.stream);
    const T* g = load(row, kGrad, element, n, g_buffer);
    // The weight, and not a backup that holds the same: what is read where it will be written is in the cache already.
    const T* w = load(row, kWeight, element, n, w_buffer);
    T* out = target(row, kWeight, element, result, false);
    perturb_loop(w, g, out, n, static_cast<T>(k.c), adaptive);
    store(row, kWeight, element, n, out, false);
  });
}

void perturb(const TensorRow& row, const Chunk& chunk, const PerturbConstants& k) {
  if (!k.move) {  // a copy, not a product with zero: fma(0, inf, w) is NaN
    if (k.backup_exists) return;
    const int64_t size = size_of(row.dtype(kWeight));
    write_bytes(at(row, kBackup, chunk.begin), at(row, kWeight, chunk.begin), chunk.count * size, k.stream);
    return;
  }
  with_arithmetic_type(row, [&](auto zero) { perturb_chunk<decltype(zero)>(row, chunk, k); });
}

// ---- restore and accumulate ---------------------------------------------------------------------------------------------

template <class T>
void accumulate_loop(const T* sum, const T* g, T* out, int64_t n, T weight, bool fresh) {
  if (fresh) {
    SAM_FUSED_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) out[i] = weight * g[i];
  } else {
    SAM_FUSED_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) out[i] = accumulated(sum[i], g[i], weight);
  }
}

template <class T>
void accumulate_chunk(const TensorRow& row, const Chunk& chunk, const AccumulateConstants& k) {
  for_each_block(chunk, [&](int64_t element, int64_t n) {
    alignas(64) T g_buffer[kBlock], sum_buffer[kBlock];
    restore(row, {chunk.tensor, element, n}, k.stream);
    const T* g = load(row, kGrad, element, n, g_buffer);
    const T* sum = k.fresh ? nullptr : load(row, kAccumulator, element, n, sum_buffer);
    // Not streamed, not even where it is fresh and not read: a second stream beside the weights' measured slower.
    T* out = target(row, kAccumulator, element, sum_buffer, false);
    accumulate_loop(sum, g, out, n, static_cast<T>(k.weight), k.fresh);
    store(row, kAccumulator, element, n, out, false);
  });
}

void accumulate(const TensorRow& row, const Chunk& chunk, const AccumulateConstants& k) {
  with_arithmetic_type(row, [&](auto zero) { accumulate_chunk<decltype(zero)>(row, chunk, k); });
}

// ---- the last pass: restore and base optimizer in one -------------------------------------------------------------------

// f(a true or false type): a flag becomes a template parameter.
template <class F>
auto with_flag(bool flag, F f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

enum class Momentum { kNone, kFirst, kRunning };

template <class T>
using SgdLoop = void (*)(SgdConstants<T> k, const T* w, const T* g, const T* v, T* v_out, T* out, int64_t n);

template <class T, Momentum kMomentum, bool kWeightDecay, bool kNesterov>
void sgd_loop(SgdConstants<T> k, const T* w, const T* g, const T* v, T* v_out, T* out, int64_t n) {
  SAM_FUSED_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const T d = sgd_direction<kWeightDecay>(k, w[i], g[i]);
    T v_new = d;
    if constexpr (kMomentum == Momentum::kRunning) v_new = sgd_momentum(k, d, v[i]);
    if constexpr (kMomentum != Momentum::kNone) v_out[i] = v_new;
    out[i] = sgd_weight<kNesterov>(k, w[i], d, v_new);
  }
}

template <class T>
SgdLoop<T> sgd_loop_for(Momentum momentum, const SgdConstants<double>& k) {
  return with_flag(k.has_weight_decay, [&](auto decay) {
    return with_flag(k.nesterov, [&](auto nesterov) -> SgdLoop<T> {
      constexpr bool kDecay = decltype(decay)::value, kNesterov = decltype(nesterov)::value;
      if (momentum == Momentum::kNone) return sgd_loop<T, Momentum::kNone, kDecay, false>;
      if (momentum == Momentum::kFirst) return sgd_loop<T, Momentum::kFirst, kDecay, kNesterov>;
      return sgd_loop<T, Momentum::kRunning, kDecay, kNesterov>;
    });
  });
}

template <class T>
void sgd_chunk(const TensorRow& row, const Chunk& chunk, const SgdConstants<double>& wide, double weight, bool stream) {
  const SgdConstants<T> k = rounded<T>(wide);
  const Momentum momentum = !k.has_momentum ? Momentum::kNone : row.first ? Momentum::kFirst : Momentum::kRunning;
  const SgdLoop<T> loop = sgd_loop_for<T>(momentum, wide);
  for_each_block(chunk, [&](int64_t element, int64_t n) {
    alignas(64) T g_buffer[kBlock], w_buffer[kBlock], v_buffer[kBlock], result[kBlock];
    const T* w = load(row, kBackup, element, n, w_buffer);
    const T* g = load_gradient(row, element, n, weight, g_buffer);
    const T* v = momentum == Momentum::kRunning ? load(row, kState0, element, n, v_buffer) : nullptr;
    T* v_out = momentum == Momentum::kNone ? nullptr : target(row, kState0, element, v_buffer, false);
    T* out = target(row, kWeight, element, result, stream);
    loop(k, w, g, v, v_out, out, n);
    if (v_out != nullptr) store(row, kState0, element, n, v_out, false);
    store(row, kWeight, element, n, out, stream);
  });
}

void sgd(const TensorRow& row, const Chunk& chunk, const SgdConstants<double>& k, double weight, bool stream) {
  with_arithmetic_type(row, [&](auto zero) { sgd_chunk<decltype(zero)>(row, chunk, k, weight, stream); });
}

template <class T>
struct AdamBlock {
  const T *w, *g, *m, *v, *v_max;
  T *w_out, *m_out, *v_out, *v_max_out;
};

template <class T, bool kCoupledWeightDecay, bool kAmsgrad>
void adam_loop(AdamConstants<T> k, AdamBlock<T> b, int64_t n) {
  SAM_FUSED_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const AdamState<T> before{b.w[i], b.m[i], b.v[i], kAmsgrad ? b.v_max[i] : T{0}};
    const AdamState<T> s = adam<kAmsgrad>(k, before, adam_direction<kCoupledWeightDecay>(k, b.w[i], b.g[i]));
    b.w_out[i] = s.w;
    b.m_out[i] = s.exp_avg;
    b.v_out[i] = s.exp_avg_sq;
    if constexpr (kAmsgrad) b.v_max_out[i] = s.max_exp_avg_sq;
  }
}

template <class T, bool kCoupledWeightDecay, bool kAmsgrad>
void adam_chunk(const TensorRow& row, const Chunk& chunk, const AdamConstants<double>& wide, double weight, bool stream) {
  const AdamConstants<T> k = rounded<T>(wide);
  for_each_block(chunk, [&](int64_t element, int64_t n) {
    alignas(64) T g_buffer[kBlock], w_buffer[kBlock], result[kBlock];
    alignas(64) T m_buffer[kBlock], v_buffer[kBlock], max_buffer[kBlock];
    AdamBlock<T> b{};
    b.w = load(row, kBackup, element, n, w_buffer);
    b.g = load_gradient(row, element, n, weight, g_buffer);
    b.m = load(row, kState0, element, n, m_buffer);
    b.v = load(row, kState1, element, n, v_buffer);
    b.w_out = target(row, kWeight, element, result, stream);
    b.m_out = target(row, kState0, element, m_buffer, false);
    b.v_out = target(row, kState1, element, v_buffer, false);
    if constexpr (kAmsgrad) {
      b.v_max = load(row, kState2, element, n, max_buffer);
      b.v_max_out = target(row, kState2, element, max_buffer, false);
    }
    adam_loop<T, kCoupledWeightDecay, kAmsgrad>(k, b, n);
    if constexpr (kAmsgrad) store(row, kState2, element, n, b.v_max_out, false);
    store(row, kState0, element, n, b.m_out, false);
    store(row, kState1, element, n, b.v_out, false);
    store(row, kWeight, element, n, b.w_out, stream);
  });
}

void adam_step(const TensorRow& row, const Chunk& chunk, const AdamConstants<double>& k, double weight, bool stream) {
  with_arithmetic_type(row, [&](auto zero) {
    with_flag(k.coupled_weight_decay, [&](auto coupled) {
      with_flag(k.amsgrad, [&](auto amsgrad) {
        adam_chunk<decltype(zero), decltype(coupled)::value, decltype(amsgrad)::value>(row, chunk, k, weight, stream);
      });
    });
  });
}

constexpr Kernels kTable{SAM_FUSED_ISA_NAME, sum_of_squares, perturb, restore, accumulate, sgd, adam_step};

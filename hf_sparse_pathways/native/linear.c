/* For a few inputs, reading the wanted rows of W where they lie:
 *
 *     linear:    y = x W[rows]^T + bias
 *     sum_rows:  y = x W[rows] + bias
 *
 * A product of one or a few vectors is as fast as the weights stream from memory. The rows that are
 * wanted lie apart, so the processor's own prefetcher loses them at each gap; here every row is
 * asked for a few rows ahead. Weights are float32, bfloat16 or int8 (with a scale per row); sums
 * are float32. Vectors are those of GCC and Clang, which lower them to what the processor has.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* Floats per vector. Where a processor has no registers of 16, compilers split them in two, but keep
 * sums in memory then: several times slower. */
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define AHEAD_BYTES 4096 /* least distance at which rows are asked for */
#define AHEAD_ROWS 4
#define LINE 64
#define UNROLL _Pragma("GCC unroll 4") /* or sums are kept in memory */
#define SUMMED 8 /* rows that are added up before a sum is put back */
#define UNROLL_SUMMED _Pragma("GCC unroll 8")

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

enum { FLOAT32, BFLOAT16, INT8 };

#ifdef __AVX512BF16__
#define HAS_DOT 1 /* a product of bfloat16 vectors, which then stay as they are */
#else
#define HAS_DOT 0
#endif

static inline float widen(uint16_t value) {
    uint32_t wide = (uint32_t)value << 16;
    float result;
    memcpy(&result, &wide, 4);
    return result;
}

static inline uint16_t narrow(float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffff) > 0x7f800000) return (uint16_t)(wide >> 16) | 0x40; /* NaN */
    return (uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

static inline vec load_float32(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline vec load_bfloat16(const uint16_t *p) {
    halves h;
    memcpy(&h, p, sizeof h);
    bits b = __builtin_convertvector(h, bits) << 16;
    vec v;
    memcpy(&v, &b, sizeof v);
    return v;
}

static inline vec load_int8(const int8_t *p) {
#if defined(__AVX512F__) /* compilers make more instructions of the lines below */
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    bytes b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(
        __builtin_convertvector(__builtin_convertvector(b, shorts), ints), vec);
#endif
}

static inline float one_float32(const float *p) { return *p; }
static inline float one_bfloat16(const uint16_t *p) { return widen(*p); }
static inline float one_int8(const int8_t *p) { return *p; }

static inline float sum(vec v) {
    float lane[LANES];
    memcpy(lane, &v, sizeof v);
    for (int half = LANES / 2; half > 0; half /= 2) /* in pairs: rounds less than one by one */
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

/* The sums of four vectors. */
static inline void sum_four(vec a, vec b, vec c, vec d, float *sums) {
#if defined(__AVX512F__)
    __m512 v = (__m512)a, w = (__m512)b, x = (__m512)c, y = (__m512)d;
    __m512 vw = _mm512_add_ps(_mm512_unpacklo_ps(v, w), _mm512_unpackhi_ps(v, w));
    __m512 xy = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(vw, xy, 0x44), _mm512_shuffle_ps(vw, xy, 0xee));
    __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), upper);
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
    __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    __m256 all = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    sums[0] = sum(a), sums[1] = sum(b), sums[2] = sum(c), sums[3] = sum(d);
#endif
}

struct job {
    const void *weight;
    ptrdiff_t stride; /* between rows, in elements */
    const int64_t *rows;
    long n, k;
    const float *x;         /* (m, k) */
    const uint16_t *narrow; /* the same in bfloat16, or NULL */
    float *y;               /* (m, n) */
};

/* Four rows of W times M inputs; M is a constant after inlining. The first M of a block of rows ask
 * for the rows that come later, the others find the block in the cache. */
#define DEFINE_TILE(TYPE, NAME)                                                                    \
    static inline __attribute__((always_inline)) void tile_##NAME(                                 \
        const struct job *job, const TYPE *const *row, const TYPE *const *later, long first,       \
        int count, long input, const int M) {                                                      \
        vec total[4][4] = {{{0}}};                                                                 \
        const float *x = job->x + input * job->k;                                                  \
        long i = 0;                                                                                \
        for (; i + LANES <= job->k; i += LANES) {                                                  \
            vec in[4];                                                                             \
            UNROLL                                                                                 \
            for (int m = 0; m < M; m++) in[m] = load_float32(x + m * job->k + i);                  \
            UNROLL                                                                                 \
            for (int r = 0; r < 4; r++) {                                                          \
                if (later && (i * sizeof(TYPE)) % LINE == 0)                                       \
                    __builtin_prefetch(later[r] + i, 0, 2);                                        \
                vec w = load_##NAME(row[r] + i);                                                   \
                UNROLL                                                                             \
                for (int m = 0; m < M; m++) total[r][m] += w * in[m];                              \
            }                                                                                      \
        }                                                                                          \
        UNROLL                                                                                     \
        for (int m = 0; m < M; m++) {                                                              \
            float sums[4];                                                                         \
            sum_four(total[0][m], total[1][m], total[2][m], total[3][m], sums);                    \
            for (int r = 0; r < count; r++) {                                                      \
                for (long j = i; j < job->k; j++)                                                  \
                    sums[r] += one_##NAME(row[r] + j) * x[m * job->k + j];                         \
                job->y[(input + m) * job->n + first + r] = sums[r];                                \
            }                                                                                      \
        }                                                                                          \
    }

DEFINE_TILE(float, float32)
DEFINE_TILE(uint16_t, bfloat16)
DEFINE_TILE(int8_t, int8)

#if HAS_DOT
/* As above for bfloat16 on both sides, two products at a time. */
static inline __attribute__((always_inline)) void tile_dot(
    const struct job *job, const uint16_t *const *row, const uint16_t *const *later, long first,
    int count, long input, const int M) {
    __m512 total[4][4];
    const uint16_t *x = job->narrow + input * job->k;
    UNROLL
    for (int r = 0; r < 4; r++)
        UNROLL
        for (int m = 0; m < M; m++) total[r][m] = _mm512_setzero_ps();
    for (long i = 0; i < job->k; i += 2 * LANES) {
        long left = job->k - i;
        __mmask32 valid = left < 2 * LANES ? (1u << left) - 1 : ~0u;
        __m512bh in[4];
        UNROLL
        for (int m = 0; m < M; m++)
            in[m] = (__m512bh)_mm512_maskz_loadu_epi16(valid, x + m * job->k + i);
        UNROLL
        for (int r = 0; r < 4; r++) {
            if (later) __builtin_prefetch(later[r] + i, 0, 2);
            __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(valid, row[r] + i);
            UNROLL
            for (int m = 0; m < M; m++) total[r][m] = _mm512_dpbf16_ps(total[r][m], w, in[m]);
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) {
        float sums[4];
        sum_four((vec)total[0][m], (vec)total[1][m], (vec)total[2][m], (vec)total[3][m], sums);
        for (int r = 0; r < count; r++) job->y[(input + m) * job->n + first + r] = sums[r];
    }
}
#endif

/* All inputs times a range of rows, four at a time. */
#define DEFINE_RUN(TYPE, NAME)                                                                     \
    static void run_##NAME(const struct job *job, long begin, long end, long inputs) {             \
        const TYPE *weight = job->weight;                                                          \
        long row_bytes = job->k * (long)sizeof(TYPE);                                              \
        long ahead = AHEAD_BYTES / (row_bytes ? row_bytes : 1);                                    \
        if (ahead < AHEAD_ROWS) ahead = AHEAD_ROWS;                                                \
        for (long first = begin; first < end; first += 4) {                                        \
            const TYPE *row[4], *later[4];                                                         \
            int count = end - first < 4 ? (int)(end - first) : 4;                                  \
            for (int r = 0; r < 4; r++) {                                                          \
                long at = first + (r < count ? r : count - 1);                                     \
                long next = at + ahead < end ? at + ahead : end - 1;                               \
                row[r] = weight + job->stride * (job->rows ? job->rows[at] : at);                  \
                later[r] = weight + job->stride * (job->rows ? job->rows[next] : next);            \
            }                                                                                      \
            long input = 0;                                                                        \
            for (; input + 4 <= inputs; input += 4)                                                \
                tile_##NAME(job, row, input ? NULL : later, first, count, input, 4);               \
            for (; input + 2 <= inputs; input += 2)                                                \
                tile_##NAME(job, row, input ? NULL : later, first, count, input, 2);               \
            if (input < inputs)                                                                    \
                tile_##NAME(job, row, input ? NULL : later, first, count, input, 1);               \
        }                                                                                          \
    }

DEFINE_RUN(float, float32)
DEFINE_RUN(uint16_t, bfloat16)
DEFINE_RUN(int8_t, int8)
#if HAS_DOT
DEFINE_RUN(uint16_t, dot)
#endif

static void run(const struct job *job, int type, long begin, long end, long inputs) {
#if HAS_DOT
    if (type == BFLOAT16 && job->narrow) {
        run_dot(job, begin, end, inputs);
        return;
    }
#endif
    if (type == FLOAT32) run_float32(job, begin, end, inputs);
    if (type == BFLOAT16) run_bfloat16(job, begin, end, inputs);
    if (type == INT8) run_int8(job, begin, end, inputs);
}

/* M inputs times some rows of W, added to a range of columns; M is a constant after inlining. */
#define DEFINE_SUMS(TYPE, NAME)                                                                    \
    static inline __attribute__((always_inline)) void add_##NAME(                                  \
        const struct job *job, const TYPE *const *row, const TYPE *const *later,                   \
        const float (*factor)[SUMMED], long begin, long end, long input, const int M) {            \
        float *y = job->y + input * job->n;                                                        \
        long i = begin;                                                                            \
        for (; i + LANES <= end; i += LANES) {                                                     \
            vec total[4];                                                                          \
            UNROLL                                                                                 \
            for (int m = 0; m < M; m++) total[m] = load_float32(y + m * job->n + i);               \
            UNROLL_SUMMED                                                                          \
            for (int r = 0; r < SUMMED; r++) {                                                     \
                if (later && (i * sizeof(TYPE)) % LINE == 0)                                       \
                    __builtin_prefetch(later[r] + i, 0, 2);                                        \
                vec w = load_##NAME(row[r] + i);                                                   \
                UNROLL                                                                             \
                for (int m = 0; m < M; m++) total[m] += w * factor[m][r];                          \
            }                                                                                      \
            UNROLL                                                                                 \
            for (int m = 0; m < M; m++) memcpy(y + m * job->n + i, &total[m], sizeof(vec));        \
        }                                                                                          \
        for (; i < end; i++)                                                                       \
            for (int m = 0; m < M; m++)                                                            \
                for (int r = 0; r < SUMMED; r++)                                                   \
                    y[m * job->n + i] += one_##NAME(row[r] + i) * factor[m][r];                    \
    }                                                                                              \
    static void sum_##NAME(const struct job *job, long begin, long end, long inputs) {             \
        for (long input = 0; input < inputs; input++)                                              \
            memset(job->y + input * job->n + begin, 0, sizeof(float) * (size_t)(end - begin));     \
        for (long first = 0; first < job->k; first += SUMMED) {                                    \
            const TYPE *row[SUMMED], *later[SUMMED];                                               \
            float factor[4][SUMMED];                                                               \
            for (int r = 0; r < SUMMED; r++) {                                                     \
                long at = first + r < job->k ? first + r : job->k - 1;                             \
                long next = at + SUMMED < job->k ? at + SUMMED : job->k - 1;                       \
                row[r] = (const TYPE *)job->weight +                                               \
                         job->stride * (job->rows ? job->rows[at] : at);                           \
                later[r] = (const TYPE *)job->weight +                                             \
                           job->stride * (job->rows ? job->rows[next] : next);                     \
            }                                                                                      \
            for (long input = 0; input < inputs;) {                                                \
                int many = inputs - input < 4 ? 1 : 4;                                             \
                for (int m = 0; m < many; m++)                                                     \
                    for (int r = 0; r < SUMMED; r++)                                               \
                        factor[m][r] =                                                             \
                            first + r < job->k ? job->x[(input + m) * job->k + first + r] : 0;     \
                const TYPE *const *ahead = input ? NULL : later;                                   \
                if (many == 4)                                                                     \
                    add_##NAME(job, row, ahead, factor, begin, end, input, 4);                     \
                else                                                                               \
                    add_##NAME(job, row, ahead, factor, begin, end, input, 1);                     \
                input += many;                                                                     \
            }                                                                                      \
        }                                                                                          \
    }

DEFINE_SUMS(float, float32)
DEFINE_SUMS(uint16_t, bfloat16)
DEFINE_SUMS(int8_t, int8)

static void run_sums(const struct job *job, int type, long begin, long end, long inputs) {
    if (type == FLOAT32) sum_float32(job, begin, end, inputs);
    if (type == BFLOAT16) sum_bfloat16(job, begin, end, inputs);
    if (type == INT8) sum_int8(job, begin, end, inputs);
}

/* What both products have in common: inputs in float32, threads, and what comes after the sums. */
static int compute(struct job job, void (*run)(const struct job *, int, long, long, long),
                   int weight_type, int widens, const float *scale, const void *bias, const void *x,
                   int input_type, long m, int threads) {
    int narrow_inputs = input_type == BFLOAT16;
    long n = job.n, k = job.k;
    void *y = job.y;
    float *wide = NULL;
    if (narrow_inputs) {
        long widened = widens ? m * k : 0;
        wide = malloc(sizeof(float) * (size_t)(widened + m * n + 1));
        if (wide == NULL) return 1;
        for (long i = 0; i < widened; i++) wide[i] = widen(((const uint16_t *)x)[i]);
        job.x = wide;
        job.y = wide + widened;
    }
    if (threads <= 1) {
        run(&job, weight_type, 0, n, m);
    } else {
        long share = (n + threads - 1) / threads;
        share = (share + LANES - 1) / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int thread = 0; thread < threads; thread++) {
            long begin = share * thread, end = begin + share < n ? begin + share : n;
            if (begin < end) run(&job, weight_type, begin, end, m);
        }
    }
    for (long i = 0; i < m && (scale || bias || narrow_inputs); i++)
        for (long j = 0; j < n; j++) {
            float value = job.y[i * n + j];
            if (scale) value *= scale[j];
            if (bias)
                value += narrow_inputs ? widen(((const uint16_t *)bias)[j]) : ((const float *)bias)[j];
            if (narrow_inputs)
                ((uint16_t *)y)[i * n + j] = narrow(value);
            else
                ((float *)y)[i * n + j] = value;
        }
    free(wide);
    return 0;
}

/* Return 0, or 1 if there is no memory.
 *
 * weight: (any, k), rows `stride` elements apart; weight_type one of the enum.
 * rows: n of its rows, or NULL for the first n.
 * scale: n factors of the sums, float32, or NULL.
 * bias: n values of the inputs' type, or NULL.
 * x: (m, k), y: (m, n), both contiguous, of input_type (float32 or bfloat16).
 */
int linear(const void *weight, int weight_type, ptrdiff_t stride, const int64_t *rows,
           const float *scale, const void *bias, const void *x, int input_type, void *y, long m,
           long n, long k, int threads) {
    int narrow_inputs = input_type == BFLOAT16, widens = !(HAS_DOT && weight_type == BFLOAT16);
    struct job job = {weight, stride, rows, n, k, x, narrow_inputs ? x : NULL, y};
    return compute(job, run, weight_type, widens, scale, bias, x, input_type, m, threads);
}

/* As above, but for the sums of rows: weight is (any, n), of which k rows are summed. */
int sum_rows(const void *weight, int weight_type, ptrdiff_t stride, const int64_t *rows,
             const float *scale, const void *bias, const void *x, int input_type, void *y, long m,
             long n, long k, int threads) {
    struct job job = {weight, stride, rows, n, k, x, NULL, y};
    return compute(job, run_sums, weight_type, 1, scale, bias, x, input_type, m, threads);
}

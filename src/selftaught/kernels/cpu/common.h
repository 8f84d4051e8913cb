/* What the loops have in common: numbers, vectors of them, and the two products of which attention consists.

   Everything is float32. n rows, H hidden width, B rows of a decoding step, D of one head, T tokens of a pass. A loop's
   work is cut in as many fixed parts as there are threads: numbers depend on their count, never on which came first.
   Sizes and pointers are checked by their callers in Python. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t size;

#define SMALL 16384 /* numbers for which a second thread is not woken */
#define LANES 16    /* numbers of a vector, which a compiler cuts down to what the processor has */
#define BLOCK 32    /* keys that are scored at a time */
#define PARTS 4     /* vectors of a value that are summed at a time */
#define LINE 16     /* numbers of a line of the cache */
#define FEWER 4     /* rows of a weight at a time where no whole ROWS are left */
#ifdef __AVX512F__
#define PANEL 16    /* columns at a time: a vector */
#define ROWS 12     /* of a weight at a time */
#define QUERIES 6   /* at a time, as many as leave registers for the rest */
#else
#define PANEL 8
#define ROWS 8
#define QUERIES 4
#endif
#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES /* of two vectors; older compilers have none */
#endif
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef float strip __attribute__((vector_size(4 * PANEL), aligned(4), may_alias));

/* Rows i and i + d of a square change their numbers where one's column has the bit d and the other's has not. */
#if PANEL == 16
#define LANES_BY(F, d)                                                                                                 \
    F(0, d), F(1, d), F(2, d), F(3, d), F(4, d), F(5, d), F(6, d), F(7, d), F(8, d), F(9, d), F(10, d), F(11, d), F(12, d), \
        F(13, d), F(14, d), F(15, d)
#else
#define LANES_BY(F, d) F(0, d), F(1, d), F(2, d), F(3, d), F(4, d), F(5, d), F(6, d), F(7, d)
#endif
#define FIRST(j, d) ((j) & (d) ? PANEL + (j) - (d) : (j))
#define SECOND(j, d) ((j) & (d) ? PANEL + (j) : (j) + (d))
#define EXCHANGE(d)                                                                  \
    _Pragma("GCC unroll 16") for (size i = 0; i < PANEL; i++) if (!(i & d)) {        \
        strip one = rows[i], other = rows[i + d];                                    \
        rows[i] = __builtin_shufflevector(one, other, LANES_BY(FIRST, d));           \
        rows[i + d] = __builtin_shufflevector(one, other, LANES_BY(SECOND, d));      \
    }

INLINE vector load(const float *x) { return *(const vector *)x; }
INLINE void store(float *x, vector y) { *(vector *)x = y; }

/* y_j[i] = x_i[j] of a square of PANEL numbers, whose rows are apart by `per_x` and `per_y`. */
INLINE void turn(const float *x, size per_x, float *y, size per_y) {
#ifdef SHUFFLES
    strip rows[PANEL];
#pragma GCC unroll 16
    for (size i = 0; i < PANEL; i++) rows[i] = *(const strip *)(x + i * per_x);
    EXCHANGE(1)
    EXCHANGE(2)
    EXCHANGE(4)
#if PANEL == 16
    EXCHANGE(8)
#endif
#pragma GCC unroll 16
    for (size j = 0; j < PANEL; j++) *(strip *)(y + j * per_y) = rows[j];
#else
    for (size i = 0; i < PANEL; i++)
        for (size j = 0; j < PANEL; j++) y[j * per_y + i] = x[i * per_x + j];
#endif
}

/* e^x to 2 units in the last place: 2^k e^r, |r| <= log(2) / 2, by the polynomial of Cephes' expf; 0 and infinity
   beyond +-88. */
INLINE float exponential(float x) {
    float at = x < -87.3f ? -87.3f : x > 88.37f ? 88.37f : x;
    float k = rintf(at * 1.44269504088896341f);
    float r = (at - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { int32_t bits; float value; } power = {((int32_t)k + 127) << 23};
    float y = (p * r * r + r + 1.0f) * power.value;
    return x < -87.3f ? 0.0f : x > 88.37f ? INFINITY : y;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
INLINE float silu(float x) { return x * sigmoid(x); }

/* scores[r][at] = q_r k_at for `count` queries and the keys of a block: (count, per_scores), keys (D, per_keys). */
INLINE void score(const float *q, size per_query, const float *keys, size per_keys, float *scores, size per_scores,
                  size count, size D) {
    vector sums[QUERIES][2] = {0};
    for (size d = 0; d < D; d++) {
        vector low = load(keys + d * per_keys), high = load(keys + d * per_keys + LANES);
        for (size r = 0; r < count; r++) {
            sums[r][0] += q[r * per_query + d] * low;
            sums[r][1] += q[r * per_query + d] * high;
        }
    }
    for (size r = 0; r < count; r++) {
        store(scores + r * per_scores, sums[r][0]);
        store(scores + r * per_scores + LANES, sums[r][1]);
    }
}

/* out[i] += sum_j w[i][j] m_j for `rows` rows i, of `parts` vectors of each m_j: w by steps, `count` of m apart by per_m. */
INLINE void combine(const float *w, size w_i, size w_j, const float *m, size per_m, float *out, size per_out, size rows,
                    size count, size parts) {
    vector sums[QUERIES][PARTS];
    for (size i = 0; i < rows; i++)
        for (size part = 0; part < parts; part++) sums[i][part] = load(out + i * per_out + part * LANES);
    for (size j = 0; j < count; j++) {
        vector v[PARTS];
        for (size part = 0; part < parts; part++) v[part] = load(m + j * per_m + part * LANES);
        for (size i = 0; i < rows; i++)
            for (size part = 0; part < parts; part++) sums[i][part] += w[i * w_i + j * w_j] * v[part];
    }
    for (size i = 0; i < rows; i++)
        for (size part = 0; part < parts; part++) store(out + i * per_out + part * LANES, sums[i][part]);
}

/* The same over all D numbers, whole vectors of them. */
INLINE void combine_all(const float *w, size w_i, size w_j, const float *m, size per_m, float *out, size per_out,
                        size rows, size count, size D) {
    size d = 0;
    for (; d + PARTS * LANES <= D; d += PARTS * LANES)
        combine(w, w_i, w_j, m + d, per_m, out + d, per_out, rows, count, PARTS);
    for (; d < D; d += LANES) combine(w, w_i, w_j, m + d, per_m, out + d, per_out, rows, count, 1);
}

/* softmax(scaling x) of the numbers [from, to), in place; returns the logarithm of its sum. Those around them up to whole
   vectors become 0. */
INLINE float softmax(float *x, size from, size to, float scaling) {
    float lanes[LANES], most = -INFINITY, sum = 0;
    size start = from / LANES * LANES, end = (to + LANES - 1) / LANES * LANES;
    for (size i = start; i < from; i++) x[i] = -INFINITY;
    for (size i = to; i < end; i++) x[i] = -INFINITY;
#pragma omp simd reduction(max : most)
    for (size i = start; i < end; i++) most = x[i] > most ? x[i] : most;
    for (size lane = 0; lane < LANES; lane++) lanes[lane] = 0;
    for (size i = start; i < end; i += LANES)
        for (size lane = 0; lane < LANES; lane++) {
            float e = exponential((x[i + lane] - most) * scaling);
            x[i + lane] = e;
            lanes[lane] += e;
        }
    for (size lane = 0; lane < LANES; lane++) sum += lanes[lane];
    float share = 1.0f / sum;
    for (size i = start; i < end; i++) x[i] *= share;
    return most * scaling + logf(sum);
}

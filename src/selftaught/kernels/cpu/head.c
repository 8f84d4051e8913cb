/* A vocabulary head for some tens of rows: the weight is read once, in the order in which it lies, and never copied. */

#include "common.h"

#define MOST (PARTS * LANES) /* rows of x at a time */
#define TOKENS 48            /* of the vocabulary at a time: whole tiles of any width, whole squares to be turned */
#ifdef __AVX512F__
#define SUMS 24 /* vectors that are summed at a time */
#else
#define SUMS 6
#endif

/* Sums of `rows` rows of w (rows, K) with a panel of x (K, parts vectors): (rows, MOST). */
INLINE void tile(const float *w, const float *x, float *out, size K, size rows, size parts) {
    vector sums[SUMS];
    for (size i = 0; i < rows * parts; i++) sums[i] = (vector){0};
    for (size k = 0; k < K; k++) {
        vector v[PARTS];
        for (size part = 0; part < parts; part++) v[part] = load(x + (k * parts + part) * LANES);
        if (k % LINE == 0)
            for (size i = 0; i < rows; i++) __builtin_prefetch(w + (rows + i) * K + k, 0, 2);
        for (size i = 0; i < rows; i++)
            for (size part = 0; part < parts; part++) sums[i * parts + part] += w[i * K + k] * v[part];
    }
    for (size i = 0; i < rows; i++)
        for (size part = 0; part < parts; part++) store(out + i * MOST + part * LANES, sums[i * parts + part]);
}

INLINE void tiles(const float *w, const float *x, float *out, size K, size count, size parts) {
    size i = 0;
    for (; i + SUMS / parts <= count; i += SUMS / parts) tile(w + i * K, x, out + i * MOST, K, SUMS / parts, parts);
    for (; i < count; i++) tile(w + i * K, x, out + i * MOST, K, 1, parts);
}

/* out (rows, count), rows apart by V, from `found` (count, MOST). */
INLINE void put_back(const float *found, float *out, size V, size rows, size count) {
    size square_rows = rows / PANEL * PANEL, square_count = count / PANEL * PANEL;
    for (size j = 0; j < square_rows; j += PANEL)
        for (size i = 0; i < square_count; i += PANEL) turn(found + i * MOST + j, MOST, out + j * V + i, V);
    for (size j = 0; j < rows; j++)
        for (size i = j < square_rows ? square_count : 0; i < count; i++) out[j * V + i] = found[i * MOST + j];
}

/* out (n, V) = x (n, K) w^T + bias, w (V, K), bias (V) or NULL; room for x in panels, (n in whole vectors, K). */
void logits(const float *x, const float *w, const float *bias, float *room, float *out, size n, size V, size K,
            int threads) {
    for (size first = 0; first < n; first += MOST) {
        size width = (n - first < MOST ? n - first + LANES - 1 : MOST) / LANES * LANES;
        for (size k = 0; k < K; k++)
            for (size j = 0; j < width; j++)
                room[first * K + k * width + j] = first + j < n ? x[(first + j) * K + k] : 0.0f;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        float found[TOKENS * MOST];
        size end = thread + 1 == threads ? V : V * (thread + 1) / threads / TOKENS * TOKENS;
        for (size v = V * thread / threads / TOKENS * TOKENS; v < end; v += TOKENS) {
            size count = end - v < TOKENS ? end - v : TOKENS;
            for (size first = 0; first < n; first += MOST) {
                size rows = n - first < MOST ? n - first : MOST, parts = (rows + LANES - 1) / LANES;
                const float *panel = room + first * K;
                if (parts == 4) tiles(w + v * K, panel, found, K, count, 4);
                else if (parts == 3) tiles(w + v * K, panel, found, K, count, 3);
                else if (parts == 2) tiles(w + v * K, panel, found, K, count, 2);
                else tiles(w + v * K, panel, found, K, count, 1);
                if (bias)
                    for (size i = 0; i < count; i++)
                        for (size j = 0; j < rows; j++) found[i * MOST + j] += bias[v + i];
                put_back(found, out + first * V + v, V, rows, count);
            }
        }
    }
}

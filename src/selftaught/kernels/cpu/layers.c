/* A decoder layer's small operations, each one pass over memory where an operator at a time takes several. */

#include "passes.h"

#define CHUNK 96 /* rows of a product's result at a time */

/* 1 / sqrt(mean(x^2) + eps): (n). */
void inverse_root(const float *x, float *root, size n, size H, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (n * H > SMALL) schedule(static)
    for (size i = 0; i < n; i++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size h = 0; h < H; h++) sum += x[i * H + h] * x[i * H + h];
        root[i] = 1.0f / sqrtf(sum / (float)H + eps);
    }
}

/* y = x w root: (n, H). */
void norm(const float *x, const float *w, const float *root, float *y, size n, size H, int threads) {
#pragma omp parallel for num_threads(threads) if (n * H > SMALL) schedule(static)
    for (size i = 0; i < n; i++)
#pragma omp simd
        for (size h = 0; h < H; h++) y[i * H + h] = x[i * H + h] * root[i] * w[h];
}

/* x += added, if anything is, then y = x w root and its root, (n): (n, H), each row read once. */
void normed(float *x, const float *added, const float *w, float *root, float *y, size n, size H, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (n * H > SMALL) schedule(static)
    for (size i = 0; i < n; i++) {
        float *row = x + i * H, *out = y + i * H, sum = 0;
        if (added)
#pragma omp simd
            for (size h = 0; h < H; h++) row[h] += added[i * H + h];
#pragma omp simd reduction(+ : sum)
        for (size h = 0; h < H; h++) sum += row[h] * row[h];
        float back = root[i] = 1.0f / sqrtf(sum / (float)H + eps);
#pragma omp simd
        for (size h = 0; h < H; h++) out[h] = row[h] * back * w[h];
    }
}

/* The gradients of x, (n, H), on top of what is `added`, if anything, and of w: (threads, H), one for each part of the
   rows. */
void norm_backward(const float *grad, const float *x, const float *w, const float *root, const float *added, float *of_x,
                   float *of_w, size n, size H, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; part++) {
        float *sums = of_w + part * H;
        memset(sums, 0, H * sizeof(float));
        for (size i = n * part / threads; i < n * (part + 1) / threads; i++) {
            const float *g = grad + i * H, *row = x + i * H;
            float *out = of_x + i * H, along = 0;
#pragma omp simd reduction(+ : along)
            for (size h = 0; h < H; h++) along += g[h] * w[h] * row[h];
            float back = along * root[i] * root[i] / (float)H;
#pragma omp simd
            for (size h = 0; h < H; h++) {
                sums[h] += g[h] * row[h] * root[i];
                out[h] = (g[h] * w[h] - row[h] * back) * root[i];
            }
            if (added)
#pragma omp simd
                for (size h = 0; h < H; h++) out[h] += added[i * H + h];
        }
    }
}

/* silu(g) u of (n, I), rows of g and u apart by `per_row` numbers, of out by `per_out`; out may be g. */
void gate(const float *g, const float *u, float *out, size n, size I, size per_row, size per_out, int threads) {
#pragma omp parallel for num_threads(threads) if (n * I > SMALL) schedule(static)
    for (size i = 0; i < n; i++)
#pragma omp simd
        for (size j = 0; j < I; j++) out[i * per_out + j] = silu(g[i * per_row + j]) * u[i * per_row + j];
}

/* From the gradient of silu(g) u, (n, I), which is overwritten by silu(g) u itself, those of g and u, whose rows are apart
   as theirs. */
void gate_backward(const float *g, const float *u, float *grad, float *of_g, float *of_u, size n, size I, size per_row,
                   int threads) {
#pragma omp parallel for num_threads(threads) if (n * I > SMALL) schedule(static)
    for (size i = 0; i < n; i++)
#pragma omp simd
        for (size j = 0; j < I; j++) {
            size at = i * per_row + j;
            float share = sigmoid(g[at]), active = g[at] * share, from = grad[i * I + j];
            of_u[at] = from * active;
            of_g[at] = from * u[at] * (share + active * (1.0f - share));
            grad[i * I + j] = active * u[at];
        }
}

/* x cos + rotate_half(x) sin of x (heads, n, D), heads and tokens apart by `per_head` and `per_token` numbers in x and in
   out, which may be x, by cos and sin (n, D); where `back`, from its gradient that of x. */
void rotate(const float *x, const float *cos, const float *sin, float *out, size heads, size n, size D, size per_head,
            size per_token, int back, int threads) {
    size half = D / 2;
#pragma omp parallel for num_threads(threads) if (n * heads * D > SMALL) schedule(static)
    for (size i = 0; i < n; i++) {
        const float *c = cos + i * D, *s = sin + i * D;
        for (size head = 0; head < heads; head++) {
            const float *from = x + head * per_head + i * per_token;
            float *to = out + head * per_head + i * per_token;
            if (back)
#pragma omp simd
                for (size d = 0; d < half; d++) {
                    float low = from[d], high = from[half + d];
                    to[d] = low * c[d] + high * s[half + d];
                    to[half + d] = high * c[half + d] - low * s[d];
                }
            else
#pragma omp simd
                for (size d = 0; d < half; d++) {
                    float low = from[d], high = from[half + d];
                    to[d] = low * c[d] - high * s[d];
                    to[half + d] = high * c[half + d] + low * s[half + d];
                }
        }
    }
}

/* out += A^T B, or A^T B where `fresh`: (M, K) of A (n, M) and B (n, K), K in whole vectors. CHUNK rows of the result at
   a time, so that their columns of A, and a few of B, stay in a cache. */
void outer(const float *a, const float *b, float *out, size n, size M, size K, int fresh, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; part++)
        for (size from = M * part / threads; from < M * (part + 1) / threads; from += CHUNK) {
            size end = M * (part + 1) / threads, to = from + CHUNK < end ? from + CHUNK : end;
            if (fresh) memset(out + from * K, 0, (to - from) * K * sizeof(float));
            size k = 0;
            for (; k + PARTS * LANES <= K; k += PARTS * LANES) {
                size m = from;
                for (; m + QUERIES <= to; m += QUERIES)
                    combine(a + m, 1, M, b + k, K, out + m * K + k, K, QUERIES, n, PARTS);
                for (; m < to; m++) combine(a + m, 1, M, b + k, K, out + m * K + k, K, 1, n, PARTS);
            }
            for (; k < K; k += LANES)
                for (size m = from; m < to; m++) combine(a + m, 1, M, b + k, K, out + m * K + k, K, 1, n, 1);
        }
}

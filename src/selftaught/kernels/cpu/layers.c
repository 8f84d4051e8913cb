/* A decoder layer's small operations, each one pass over memory where an operator at a time takes several. */

#include "common.h"

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

/* The gradients of x, (n, H), and of w: (threads, H), one for each part of the rows. */
void norm_backward(const float *grad, const float *x, const float *w, const float *root, float *of_x, float *of_w,
                   size n, size H, int threads) {
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
        }
    }
}

/* silu(g) u; out may be g. */
void gate(const float *g, const float *u, float *out, size count, int threads) {
#pragma omp parallel for simd num_threads(threads) if (count > SMALL) schedule(static)
    for (size i = 0; i < count; i++) out[i] = silu(g[i]) * u[i];
}

/* From the gradient of silu(g) u, which is overwritten by silu(g) u itself, those of g and u. */
void gate_backward(const float *g, const float *u, float *grad, float *of_g, float *of_u, size count, int threads) {
#pragma omp parallel for simd num_threads(threads) if (count > SMALL) schedule(static)
    for (size i = 0; i < count; i++) {
        float share = sigmoid(g[i]), active = g[i] * share, from = grad[i];
        of_u[i] = from * active;
        of_g[i] = from * u[i] * (share + active * (1.0f - share));
        grad[i] = active * u[i];
    }
}

/* x cos + rotate_half(x) sin of x (heads, n, D), heads and tokens apart by `per_head` and `per_token` numbers in x and in
   out, by cos and sin (n, D); where `back`, from its gradient that of x. */
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
                    to[d] = from[d] * c[d] + from[half + d] * s[half + d];
                    to[half + d] = from[half + d] * c[half + d] - from[d] * s[d];
                }
            else
#pragma omp simd
                for (size d = 0; d < half; d++) {
                    to[d] = from[d] * c[d] - from[half + d] * s[d];
                    to[half + d] = from[half + d] * c[half + d] + from[d] * s[half + d];
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

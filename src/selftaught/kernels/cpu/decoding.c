/* A decoding step, for few rows, which are the last axis from layer to layer: products, norms, attention, and layers of
   them. */

#include "common.h"

/* x (w + offset) root over the middle axis of x (groups, H, B), with room for B numbers. */
void norm_turned(const float *x, const float *w, float *y, float *root, size groups, size H, size B, float eps,
                 float offset) {
    for (size g = 0; g < groups; g++, x += H * B, y += H * B) {
        memset(root, 0, B * sizeof(float));
        for (size h = 0; h < H; h++)
#pragma omp simd
            for (size b = 0; b < B; b++) root[b] += x[h * B + b] * x[h * B + b];
        for (size b = 0; b < B; b++) root[b] = 1.0f / sqrtf(root[b] / (float)H + eps);
        for (size h = 0; h < H; h++)
#pragma omp simd
            for (size b = 0; b < B; b++) y[h * B + b] = x[h * B + b] * root[b] * (w[h] + offset);
    }
}

/* `rotate` of x (heads, D, B) by cos and sin (B, D), turned back: (heads, B, D). */
void rotate_turned(const float *x, const float *cos, const float *sin, float *out, size heads, size D, size B) {
    size half = D / 2;
    for (size head = 0; head < heads; head++, x += D * B, out += B * D)
        for (size b = 0; b < B; b++) {
            const float *c = cos + b * D, *s = sin + b * D;
            float *to = out + b * D;
            for (size d = 0; d < half; d++) {
                float low = x[d * B + b], high = x[(half + d) * B + b];
                to[d] = low * c[d] - high * s[d];
                to[half + d] = high * c[half + d] + low * s[half + d];
            }
        }
}

/* Moves a pointer on, and hides from the compiler that several move alike: it would count once for all of them, and Intel's
   processors split a product with a number at base + index in two (the weights of a layer: 78 instead of 114 GFLOP/s). */
#define NEXT(pointer, step)              \
    do {                                 \
        pointer += step;                 \
        __asm__("" : "+r"(pointer));     \
    } while (0)

/* Sums of `rows` rows of w (M, K) with a panel of x, (K, width), to (rows, width). What comes next is called for: the lines of
   as many rows, of three rows in a row where that goes up, since memory answers fewer and longer streams sooner. */
#define TILE(width)                                                                                                \
    INLINE void tile_##width(const float *x, const float *w, float *sums, size K, size rows) {                     \
        typedef float panel __attribute__((vector_size(4 * width), aligned(4), may_alias));                        \
        panel s[ROWS];                                                                                             \
        const float *at[ROWS];                                                                                     \
        size k = 0, by = rows % 3 ? 1 : 3;                                                                         \
        for (size r = 0; r < rows; r++) s[r] = (panel){0}, at[r] = w + r * K;                                      \
        for (; k + LINE <= K; k += LINE) {                                                                         \
            for (size r = 0; r < rows; r++)                                                                        \
                __builtin_prefetch(w + (rows + r / by * by) * K + by * k + r % by * LINE, 0, 2);                   \
            _Pragma("GCC unroll 16") for (size i = 0; i < LINE; i++) {                                             \
                panel v = *(const panel *)(x + (k + i) * width);                                                   \
                for (size r = 0; r < rows; r++) s[r] += at[r][i] * v;                                              \
            }                                                                                                      \
            for (size r = 0; r < rows; r++) NEXT(at[r], LINE);                                                     \
        }                                                                                                          \
        for (; k < K; k++)                                                                                         \
            for (size r = 0; r < rows; r++) s[r] += w[r * K + k] * *(const panel *)(x + k * width);                \
        for (size r = 0; r < rows; r++) *(panel *)(sums + r * width) = s[r];                                       \
    }
TILE(16)
TILE(8)

typedef struct {
    const float *x, *w;                          /* (K, B); (M, K) */
    const float *bias, *gated, *residual;        /* (M), (M, B), (M, B), each of them or NULL */
    float *room, *out;                           /* (K, B in whole panels); (M, B) */
    size M, K, B, x_k, x_b, out_m, out_b;        /* and how far apart neighbours are; all (M, B) lie as out does */
    int threads;
} Product;

INLINE size panel_width(size B, size first) { return B - first > 8 ? PANEL : 8; }

/* Where x lies in panels of columns, (K, width) each, with zeros beyond the last. */
INLINE const float *panels_at(const Product *p) {
    return p->B == PANEL && p->x_b == 1 && p->x_k == PANEL ? p->x : p->room;
}

/* Puts it there. */
INLINE const float *panels(const Product *p) {
    if (panels_at(p) == p->x) return p->x;
    for (size first = 0; first < p->B; first += PANEL) {
        size width = panel_width(p->B, first), real = p->B - first < width ? p->B - first : width;
        float *to = p->room + first * p->K;
        for (size k = 0; k < p->K; k++)
            for (size b = 0; b < width; b++)
                to[k * width + b] = b < real ? p->x[k * p->x_k + (first + b) * p->x_b] : 0.0f;
    }
    return p->room;
}

/* Rows m to m + rows of the product. */
INLINE void product_rows(const Product *p, const float *x, size m, size rows) {
    float sums[ROWS * 16];
    for (size first = 0; first < p->B; first += PANEL) {
        size width = panel_width(p->B, first), real = p->B - first < width ? p->B - first : width;
        if (width == 16) tile_16(x + first * p->K, p->w + m * p->K, sums, p->K, rows);
        else tile_8(x + first * p->K, p->w + m * p->K, sums, p->K, rows);
        for (size r = 0; r < rows; r++) {
            size at = (m + r) * p->out_m + first * p->out_b;
            float *sum = sums + r * width;
            if (p->bias)
                for (size b = 0; b < real; b++) sum[b] += p->bias[m + r];
            if (p->gated)
#pragma omp simd
                for (size b = 0; b < real; b++) sum[b] *= silu(p->gated[at + b * p->out_b]);
            if (p->residual)
                for (size b = 0; b < real; b++) sum[b] += p->residual[at + b * p->out_b];
            for (size b = 0; b < real; b++) p->out[at + b * p->out_b] = sum[b];
        }
    }
}

/* Where the part of so many rows begins, in whole blocks of them. */
INLINE size cut(size M, size part, size parts) { return part == parts ? M : M * part / parts / ROWS * ROWS; }

/* Rows [from, to) of products with one x that lie one behind the other, as far as they are this one's, which starts at
   `start`. Inlined where it is called, gcc takes five times as long. */
static __attribute__((noinline)) void product_part(const Product *p, const float *x, size start, size from, size to) {
    size m = from > start ? from - start : 0, end = to - start < p->M ? to - start : p->M;
    for (; m + ROWS <= end; m += ROWS) product_rows(p, x, m, ROWS);
    for (; m + FEWER <= end; m += FEWER) product_rows(p, x, m, FEWER);
    for (; m < end; m++) product_rows(p, x, m, 1);
}

/* silu(gated) (W x + bias) + residual, for few columns: the weight is read once, in the order in which it lies. */
void product(const Product *p) {
    const float *x = panels(p);
#pragma omp parallel for num_threads(p->threads) if (p->M * p->K > SMALL) schedule(static)
    for (int part = 0; part < p->threads; part++)
        product_part(p, x, 0, cut(p->M, part, p->threads), cut(p->M, part + 1, p->threads));
}

/* ---- a layer but for its attention ---- */

typedef struct {
    const float *x, *norm;                 /* (H, B); (H) */
    const float *w[3], *bias[3], *of[2];   /* of queries, keys, values: (heads D, H), (heads D) or NULL; norms (D) or NULL */
    const float *cos, *sin;                /* (B, D) */
    float *room, *out[3];                  /* as layer.py says; (heads, B, D) */
    size H, B, D, heads[3];
    float eps[3], offset[3];               /* of the layer's norm, and of those of queries and keys */
    int threads;
} Before;

INLINE size padded(size B) { return (B + PANEL - 1) / PANEL * PANEL; }

/* The norm, then queries, keys and values, the first two normed by head, if at all, and rotated. */
void before(const Before *b) {
    size B = b->B, D = b->D, all = b->heads[0] + b->heads[1] + b->heads[2], rows = all * D;
    float *root = b->room, *normed = root + B, *panel = normed + b->H * B, *made = panel + b->H * padded(B);
    Product each[3];
    norm_turned(b->x, b->norm, normed, root, 1, b->H, B, b->eps[0], b->offset[0]);
    for (size i = 0, start = 0; i < 3; start += b->heads[i++] * D)
        each[i] = (Product){.x = normed, .w = b->w[i], .bias = b->bias[i], .room = panel, .out = made + start * B,
                            .M = b->heads[i] * D, .K = b->H, .B = B, .x_k = B, .x_b = 1, .out_m = B, .out_b = 1};
    const float *x = panels(&each[0]);
#pragma omp parallel num_threads(b->threads)
    {
#pragma omp for schedule(static)
        for (int part = 0; part < b->threads; part++) {
            size from = cut(rows, part, b->threads), to = cut(rows, part + 1, b->threads);
            for (size i = 0, start = 0; i < 3; start += each[i++].M)
                if (from < start + each[i].M && to > start) product_part(&each[i], x, start, from, to);
        }
#pragma omp for schedule(static)
        for (size head = 0; head < all; head++) {
            size i = head < b->heads[0] ? 0 : head < b->heads[0] + b->heads[1] ? 1 : 2;
            size own = head - (i > 0 ? b->heads[0] : 0) - (i > 1 ? b->heads[1] : 0);
            float *from = made + head * D * B, *to = b->out[i] + own * B * D, *spare = made + all * D * B + head * (D + 1) * B;
            if (i == 2) {
                for (size d = 0; d < D; d++)
                    for (size at = 0; at < B; at++) to[at * D + d] = from[d * B + at];
            } else {
                if (b->of[i]) norm_turned(from, b->of[i], spare + B, spare, 1, D, B, b->eps[i + 1], b->offset[i + 1]);
                rotate_turned(b->of[i] ? spare + B : from, b->cos, b->sin, to, 1, D, B);
            }
        }
    }
}

typedef struct {
    const float *seen, *x, *o, *bias;         /* what attention made, (B, K); (H, B); (H, K); (H) or NULL */
    const float *norm, *gate, *up, *down;     /* (H); (I, H) twice; (H, I) */
    float *room, *out;                        /* as layer.py says; (H, B) */
    size H, I, K, B;
    float eps, offset;
    int threads;
} After;

/* The product of what was attended and its sum, then the norm, the gated layer and its sum. */
void after(const After *a) {
    size B = a->B, H = a->H, I = a->I, threads = a->threads;
    float *root = a->room, *middle = root + B, *normed = middle + H * B, *inner = normed + H * B;
    float *gated = inner + I * B, *panel = gated + I * B;
    Product p = {.room = panel, .B = B, .x_b = 1, .x_k = B, .out_m = B, .out_b = 1};
    Product o = p, gate = p, up = p, down = p;
    o.x = a->seen, o.x_k = 1, o.x_b = a->K, o.w = a->o, o.bias = a->bias, o.residual = a->x, o.out = middle;
    gate.x = up.x = normed, gate.w = a->gate, up.w = a->up, gate.out = gated, up.gated = gated, up.out = inner;
    down.x = inner, down.w = a->down, down.residual = middle, down.out = a->out;
    o.K = a->K, gate.K = up.K = H, down.K = I, o.M = down.M = H, gate.M = up.M = I;
    const float *x = panels(&o);
#pragma omp parallel num_threads(a->threads) firstprivate(x)
    {
#pragma omp for schedule(static)
        for (size part = 0; part < threads; part++) product_part(&o, x, 0, cut(H, part, threads), cut(H, part + 1, threads));
#pragma omp single
        {
            norm_turned(middle, a->norm, normed, root, 1, H, B, a->eps, a->offset);
            panels(&gate);
        }
        x = panels_at(&gate);
#pragma omp for schedule(static)
        for (size part = 0; part < threads; part++)
            for (size m = cut(I, part, threads), end = cut(I, part + 1, threads); m < end; m += ROWS) {
                size to = m + ROWS < end ? m + ROWS : end; /* a few rows of both, whose gate is in the cache still */
                product_part(&gate, x, 0, m, to), product_part(&up, x, 0, m, to);
            }
#pragma omp single
        panels(&down);
        x = panels_at(&down);
#pragma omp for schedule(static)
        for (size part = 0; part < threads; part++)
            product_part(&down, x, 0, cut(H, part, threads), cut(H, part + 1, threads));
    }
}

typedef struct {
    const float *query, *key, *value;   /* (Hq, B, D), (Hkv, B, D) twice: the token that each row reads */
    const float *prompt_k, *prompt_v;   /* (Hkv, groups, D, P), (Hkv, groups, P', D): P in whole blocks, P' <= P */
    float *held_k, *held_v;             /* (Hkv, B, D, capacity), (Hkv, B, capacity, D): what each row has written */
    const size *group, *length;         /* of each row (B), of each group's prompt (groups) */
    float *scores, *out;                /* room (threads, QUERIES, P + capacity); (B, Hq, D) */
    size kv_heads, repeat, rows, groups, prompt, values, capacity, written, width, window;
    float scaling;
    int threads;
} Attention;

/* `count` queries of a row that share their key head, the first of them `first`. */
INLINE void attend_queries(const Attention *a, size head, size row, size first, size count, float *scores) {
    size D = a->width, P = a->prompt, group = a->group[row], one = head * a->rows + row, per_scores = P + a->capacity;
    size length = a->length[group], end = a->written + 1, sight = length + end - a->window; /* the first in sight */
    size start = sight < 0 ? 0 : sight < length ? sight : length, begin = sight > length ? sight - length : 0;
    const float *query = a->query + ((head * a->repeat + first) * a->rows + row) * D, *own_v = a->held_v;
    const float *prompt_k = a->prompt_k + (head * a->groups + group) * D * P, *own_k = a->held_k;
    const float *prompt_v = a->prompt_v + (head * a->groups + group) * a->values * D;
    float *out = a->out + ((row * a->kv_heads + head) * a->repeat + first) * D;
    own_k += one * D * a->capacity, own_v += one * a->capacity * D;
    for (size at = start / BLOCK * BLOCK; at < length; at += BLOCK)
        score(query, a->rows * D, prompt_k + at, P, scores + at, per_scores, count, D);
    for (size at = begin / BLOCK * BLOCK; at < end; at += BLOCK)
        score(query, a->rows * D, own_k + at, a->capacity, scores + P + at, per_scores, count, D);
    /* what was written stands behind the prompt without a gap */
    for (size r = 0; r < count; r++) {
        float *of_r = scores + r * per_scores;
        memmove(of_r + length, of_r + P + begin, (end - begin) * sizeof(float));
        softmax(of_r, start, length + end - begin, a->scaling);
    }
    memset(out, 0, count * D * sizeof(float));
    combine_all(scores + start, per_scores, 1, prompt_v + start * D, D, out, D, count, length - start, D);
    combine_all(scores + length, per_scores, 1, own_v + begin * D, D, out, D, count, end - begin, D);
}

/* Attention of one token of every row over its prompt and what it has written, the token included; D in whole vectors. */
void attend(const Attention *a) {
    size tasks = a->kv_heads * a->rows, room = QUERIES * (a->prompt + a->capacity), D = a->width;
#pragma omp parallel for num_threads(a->threads) if (tasks * room * D > SMALL) schedule(static)
    for (int part = 0; part < a->threads; part++)
        for (size task = tasks * part / a->threads; task < tasks * (part + 1) / a->threads; task++) {
            size head = task / a->rows, row = task % a->rows, first = 0;
            float *scores = a->scores + part * room;
            for (size d = 0; d < D; d++) a->held_k[(task * D + d) * a->capacity + a->written] = a->key[task * D + d];
            memcpy(a->held_v + (task * a->capacity + a->written) * D, a->value + task * D, D * sizeof(float));
            for (; first + 4 <= a->repeat; first += 4) attend_queries(a, head, row, first, 4, scores);
            if (a->repeat - first == 3) attend_queries(a, head, row, first, 3, scores);
            if (a->repeat - first == 2) attend_queries(a, head, row, first, 2, scores);
            if (a->repeat - first == 1) attend_queries(a, head, row, first, 1, scores);
        }
}

/* ---- whole layers ---- */

typedef struct {
    Before before;
    Attention attention;
    After after;
} Layer;

/* One after the other: each reads what the one before has put out, and so many tokens were written before. */
void decode(const Layer *layers, size count, size written) {
    for (const Layer *layer = layers; layer < layers + count; layer++) {
        Attention attention = layer->attention;
        attention.written = written;
        before(&layer->before);
        attend(&attention);
        after(&layer->after);
    }
}

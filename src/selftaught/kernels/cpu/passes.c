/* A decoder layer of a packed pass, forward and back, each in one call: norm, attention, sum, norm, gated layer, sum. Beside
   products of some hundred rows, what Python does between them is no small part.

   Products are those of the library by which torch multiplies. Shapes: n tokens of the pass, H hidden, I inner width,
   Q = Hq D, A = (Hq + 2 Hkv) D. */

#include "passes.h"

/* Fortran's: matrices lie by columns, and integers may be of 32 bits, of which the lower half of ours is one. */
typedef void product(const char *, const char *, const size *, const size *, const size *, const float *, const float *,
                     const size *, const float *, const size *, const float *, float *, const size *);

typedef struct {
    Pass pass;                                                /* its attention, of what lies in `at` */
    product *sgemm;
    const float *cos, *sin;                                   /* (n, D) */
    const float *norm, *between;                              /* (H) */
    const float *heads, *out, *inner, *down;                  /* (A, H), (H, Q), (2 I, H), (H, I) */
    float *x;                                                 /* (n, H) */
    float *root, *again, *at, *middle, *both;                 /* of the first norm, (n), of the second, (n, A), (n, H), (n, 2 I) */
    float *result, *room;                                     /* forward: (n, H), n max(H, I) */
    const float *grad;                                        /* backward: (n, H) */
    float *of_x, *of_norm, *of_between;                       /* backward: (n, H), (H) */
    float *of_heads, *of_out, *of_inner, *of_down;            /* backward: as the weights */
    size n, H, I, Q, A, D;
    float eps[2];
    int adds[4];                                              /* backward: to what is in the last four? */
    int threads;
} Layer;

/* y = x W^T, on top of what is there if `adds`: (n, M) of (n, K) and (M, K). */
static void forth(const Layer *p, const float *x, const float *w, float *y, size M, size K, int adds) {
    float one = 1, onto = (float)adds;
    p->sgemm("T", "N", &M, &p->n, &K, &one, w, &K, x, &K, &onto, y, &M);
}

/* g W: (n, K) of (n, M) and (M, K). */
static void back(const Layer *p, const float *g, const float *w, float *y, size M, size K) {
    float one = 1, zero = 0;
    p->sgemm("N", "N", &K, &p->n, &M, &one, w, &K, g, &M, &zero, y, &K);
}

/* g^T x, on top of what is there if `adds`: (M, K) of (n, M) and (n, K). */
static void of_weight(const Layer *p, const float *g, const float *x, float *y, size M, size K, int adds) {
    float one = 1, onto = (float)adds;
    p->sgemm("N", "T", &K, &M, &p->n, &one, x, &K, g, &M, &onto, y, &K);
}

static void copy(const Layer *p, const float *from, float *to) {
#pragma omp parallel for num_threads(p->threads) schedule(static)
    for (size i = 0; i < p->n; i++) memcpy(to + i * p->H, from + i * p->H, p->H * sizeof(float));
}

void forward_layer(const Layer *p) {
    size n = p->n, H = p->H, I = p->I, turned = p->pass.heads + p->pass.kv_heads;
    normed(p->x, NULL, p->norm, p->root, p->room, n, H, p->eps[0], p->threads);
    forth(p, p->room, p->heads, p->at, p->A, H, 0);
    rotate(p->at, p->cos, p->sin, p->at, turned, n, p->D, p->D, p->A, 0, p->threads);
    attend_pass(&p->pass);
    forth(p, p->pass.made, p->out, p->middle, H, p->Q, 0);
    normed(p->middle, p->x, p->between, p->again, p->room, n, H, p->eps[1], p->threads);
    forth(p, p->room, p->inner, p->both, 2 * I, H, 0);
    gate(p->both, p->both + I, p->room, n, I, 2 * I, I, p->threads);
    copy(p, p->middle, p->result);
    forth(p, p->room, p->down, p->result, H, I, 1);
}

/* The gradient of a norm's x, with what is added to it, in place, and of its weight: room for (threads, H). */
static void norm_back(const Layer *p, float *grad, const float *x, const float *w, const float *root, const float *added,
                      float *of_x, float *of_w, float *room) {
    norm_backward(grad, x, w, root, added, of_x, room, p->n, p->H, p->threads);
    memcpy(of_w, room, p->H * sizeof(float));
    for (int part = 1; part < p->threads; part++)
        for (size h = 0; h < p->H; h++) of_w[h] += room[part * p->H + h];
}

/* Room: n max(2 I, A + Q), n max(H, I), n H and (threads, H). */
void backward_layer(const Layer *p) {
    size n = p->n, H = p->H, I = p->I, A = p->A, Q = p->Q, turned = p->pass.heads + p->pass.kv_heads;
    float *of_both = p->room, *of_at = p->room, *of_seen = of_at + n * A;
    float *inner = p->room + n * (2 * I > A + Q ? 2 * I : A + Q);
    float *of_middle = inner + n * (H > I ? H : I), *sums = of_middle + n * H;
    back(p, p->grad, p->down, inner, H, I);
    gate_backward(p->both, p->both + I, inner, of_both, of_both + I, n, I, 2 * I, p->threads);
    of_weight(p, p->grad, inner, p->of_down, H, I, p->adds[3]);
    norm(p->middle, p->between, p->again, inner, n, H, p->threads);
    of_weight(p, of_both, inner, p->of_inner, 2 * I, H, p->adds[2]);
    back(p, of_both, p->inner, of_middle, 2 * I, H);
    norm_back(p, of_middle, p->middle, p->between, p->again, p->grad, of_middle, p->of_between, sums);
    of_weight(p, of_middle, p->pass.out, p->of_out, H, Q, p->adds[1]);
    back(p, of_middle, p->out, of_seen, H, Q);
    attend_pass_backward(&p->pass); /* from of_seen to of_at */
    rotate(of_at, p->cos, p->sin, of_at, turned, n, p->D, p->D, A, 1, p->threads);
    norm(p->x, p->norm, p->root, inner, n, H, p->threads);
    of_weight(p, of_at, inner, p->of_heads, A, H, p->adds[0]);
    back(p, of_at, p->heads, inner, A, H);
    norm_back(p, inner, p->x, p->norm, p->root, of_middle, p->of_x, p->of_norm, sums);
}

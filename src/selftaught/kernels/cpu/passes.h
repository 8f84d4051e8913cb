/* What the attention of a packed pass is given, and the loops of which whole layers of one are made. */

#include "common.h"

#define STRIPE 36 /* queries of one head at a time */

typedef struct {
    const float *query, *key, *value;         /* (Hq, T, D), (Hkv, T, D) twice; the steps between neighbours are below */
    const float *grad, *out;                  /* backward: (T, Hq, D) twice */
    const float *log_sum;                     /* backward: (Hq, T) */
    const size *start, *length;               /* of each sequence */
    const size *common;                       /* first tokens of the pass that it sees */
    const size *prompt, *prompt_length;       /* and of its prompt; the length may be 0 */
    const size *first;                        /* backward: the first sequence of each part, and their number: parts + 1 */
    float *made, *sums;                       /* forward: (T, Hq, D), (Hq, T) */
    float *of_query, *of_key, *of_value;      /* backward: (T, Hq, D), (T, Hkv, D) twice; the step between tokens is below */
    float *before;                            /* backward: (parts, Hkv, 2, longest, D), for what several parts share */
    float *room;                              /* (threads, space) */
    size sequences, parts, longest, heads, kv_heads, tokens, width, space;
    size query_head, query_token, key_head, key_token, value_head, value_token, of_query_token, of_key_token;
    float scaling;
    int threads;
} Pass;

#pragma GCC visibility push(protected) /* `norm` is one of these here, whatever else the process has of that name */
void attend_pass(const Pass *p);
void attend_pass_backward(const Pass *p);
void norm(const float *x, const float *w, const float *root, float *y, size n, size H, int threads);
void normed(float *x, const float *added, const float *w, float *root, float *y, size n, size H, float eps, int threads);
void norm_backward(const float *grad, const float *x, const float *w, const float *root, const float *added, float *of_x,
                   float *of_w, size n, size H, int threads);
void gate(const float *g, const float *u, float *out, size n, size I, size per_row, size per_out, int threads);
void gate_backward(const float *g, const float *u, float *grad, float *of_g, float *of_u, size n, size I, size per_row,
                   int threads);
void rotate(const float *x, const float *cos, const float *sin, float *out, size heads, size n, size D, size per_head,
            size per_token, int back, int threads);
#pragma GCC visibility pop

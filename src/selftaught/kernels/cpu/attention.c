/* Attention of a packed pass, forward and backward, without a mask, a copy for each response, or padding.

   A sequence is a run of tokens that sees itself causally, and whole what stands before it: the first `common` tokens of
   the pass, and the run that is its prompt. Queries are taken a stripe at a time, each with the scores of all its keys
   at once (flash attention's softmax, arXiv 2307.08691, without its blocks of keys: a stripe's scores stay in a cache up
   to some thousand tokens). */

#include "passes.h"

INLINE size in_blocks(size count) { return (count + BLOCK - 1) / BLOCK * BLOCK; }

/* Keys before a sequence's own. */
INLINE size prefix(const Pass *p, size sequence) { return p->common[sequence] + p->prompt_length[sequence]; }

/* Where key `at` of a sequence stands in the pass. */
INLINE size token_of(const Pass *p, size sequence, size at) {
    if (at < p->common[sequence]) return at;
    at -= p->common[sequence];
    size prompt = p->prompt_length[sequence];
    return at < prompt ? p->prompt[sequence] + at : p->start[sequence] + at - prompt;
}

/* The keys (or values) that a sequence sees: upright, (D, whole blocks), flat, (keys, D), or both. */
static void collect(const Pass *p, const float *x, size per_token, size sequence, float *upright, float *flat) {
    size D = p->width, keys = prefix(p, sequence) + p->length[sequence], blocks = in_blocks(keys);
    size first[] = {0, p->prompt[sequence], p->start[sequence]}, at = 0;
    size count[] = {p->common[sequence], p->prompt_length[sequence], p->length[sequence]};
    for (size run = 0; run < 3; run++)
        for (size i = 0, some; i < count[run]; i += some, at += some) {
            const float *rows = x + (first[run] + i) * per_token;
            some = count[run] - i < PANEL ? 1 : PANEL;
            if (flat)
                for (size j = 0; j < some; j++) memcpy(flat + (at + j) * D, rows + j * per_token, D * sizeof(float));
            if (upright && some == PANEL)
                for (size d = 0; d < D; d += PANEL) turn(rows + d, per_token, upright + d * blocks + at, blocks);
            else if (upright)
                for (size d = 0; d < D; d++) upright[d * blocks + at] = rows[d];
        }
    if (upright)
        for (size d = 0; d < D; d++) memset(upright + d * blocks + keys, 0, (blocks - keys) * sizeof(float));
}

/* q_i k_j of the rows of a stripe, (rows, per_row), for all keys that row i sees: the last one sees `keys`, each one before
   it one less. Where no QUERIES are left the last ones are taken again. */
INLINE void scored(const float *q, size per_query, const float *upright, size per_row, float *scores, size rows,
                   size keys, size D) {
    if (rows >= QUERIES)
        for (size next = 0; next < rows; next += QUERIES) {
            size i = next + QUERIES <= rows ? next : rows - QUERIES;
            for (size at = 0; at < keys - rows + i + QUERIES; at += BLOCK)
                score(q + i * per_query, per_query, upright + at, per_row, scores + i * per_row + at, per_row, QUERIES, D);
        }
    else
        for (size i = 0; i < rows; i++)
            for (size at = 0; at < keys - rows + i + 1; at += BLOCK)
                score(q + i * per_query, per_query, upright + at, per_row, scores + i * per_row + at, per_row, 1, D);
}

/* out_i = sum_j w_ij m_j of the rows of a stripe and the keys that each sees, as above; out is (rows, per_out). */
INLINE void seen_by(const float *w, size per_row, const float *m, float *out, size per_out, size rows, size keys,
                    size D) {
    for (size i = 0; i < rows; i++) memset(out + i * per_out, 0, D * sizeof(float));
    size i = 0;
    for (; i + QUERIES <= rows; i += QUERIES)
        combine_all(w + i * per_row, per_row, 1, m, D, out + i * per_out, per_out, QUERIES, keys - rows + i + QUERIES, D);
    for (; i + 2 <= rows; i += 2)
        combine_all(w + i * per_row, per_row, 1, m, D, out + i * per_out, per_out, 2, keys - rows + i + 2, D);
    for (; i < rows; i++)
        combine_all(w + i * per_row, per_row, 1, m, D, out + i * per_out, per_out, 1, keys - rows + i + 1, D);
}

/* out_j += sum_i w_ij m_i for all keys j, over those rows i of a stripe that see key j; out is (keys, D). */
INLINE void given_to(const float *w, size per_row, const float *m, size per_m, float *out, size rows, size keys,
                     size D) {
    size j = 0;
    for (; j + QUERIES <= keys; j += QUERIES) {
        size i = j < keys - rows ? 0 : j - (keys - rows);
        combine_all(w + i * per_row + j, 1, per_row, m + i * per_m, per_m, out + j * D, D, QUERIES, rows - i, D);
    }
    for (; j < keys; j++) {
        size i = j < keys - rows ? 0 : j - (keys - rows);
        combine_all(w + i * per_row + j, 1, per_row, m + i * per_m, per_m, out + j * D, D, 1, rows - i, D);
    }
}

INLINE void forward(const Pass *p, size sequence, size kv_head, float *room, size D) {
    size keys = prefix(p, sequence) + p->length[sequence], blocks = in_blocks(keys), repeat = p->heads / p->kv_heads;
    float *upright = room, *values = upright + D * blocks, *scores = values + D * blocks;
    collect(p, p->key + kv_head * p->key_head, p->key_token, sequence, upright, NULL);
    collect(p, p->value + kv_head * p->value_head, p->value_token, sequence, NULL, values);
    for (size head = kv_head * repeat; head < (kv_head + 1) * repeat; head++)
        for (size first = 0; first < p->length[sequence]; first += STRIPE) {
            size rows = p->length[sequence] - first < STRIPE ? p->length[sequence] - first : STRIPE;
            size token = p->start[sequence] + first, seen = prefix(p, sequence) + first + rows;
            float *out = p->made + (token * p->heads + head) * D;
            scored(p->query + head * p->query_head + token * p->query_token, p->query_token, upright, blocks, scores,
                   rows, seen, D);
            for (size i = 0; i < rows; i++) {
                float *of_i = scores + i * blocks;
                size mine = seen - rows + i + 1;
                p->sums[head * p->tokens + token + i] = softmax(of_i, 0, mine, p->scaling);
                memset(of_i + mine, 0, (seen - mine) * sizeof(float));
            }
            seen_by(scores, blocks, values, out, p->heads * D, rows, seen, D);
        }
}

/* (T, Hq, D), and the logarithms of the softmaxes' sums. */
void attend_pass(const Pass *p) {
#pragma omp parallel for num_threads(p->threads) schedule(static)
    for (int thread = 0; thread < p->threads; thread++)
        for (size task = thread; task < p->sequences * p->kv_heads; task += p->threads) {
            float *room = p->room + thread * p->space;
            if (p->width == 64) forward(p, task / p->kv_heads, task % p->kv_heads, room, 64);
            else forward(p, task / p->kv_heads, task % p->kv_heads, room, p->width);
        }
}

/* One part: some sequences of one prompt, under one key head. */
INLINE void backward(const Pass *p, size part, size kv_head, float *room, size D) {
    size repeat = p->heads / p->kv_heads, wide = p->heads * D, longest = 0;
    for (size s = p->first[part]; s < p->first[part + 1]; s++)
        longest = p->length[s] > longest ? p->length[s] : longest;
    size ahead = prefix(p, p->first[part]), most = in_blocks(ahead + longest);
    float *upright_k = room, *upright_v = upright_k + D * most, *flat_k = upright_v + D * most;
    float *of_k = flat_k + D * most, *of_v = of_k + D * most, *probs = of_v + D * most, *back = probs + STRIPE * most;
    memset(of_k, 0, 2 * D * most * sizeof(float));
    for (size s = p->first[part]; s < p->first[part + 1]; s++) {
        size keys = ahead + p->length[s], blocks = in_blocks(keys);
        collect(p, p->key + kv_head * p->key_head, p->key_token, s, upright_k, flat_k);
        collect(p, p->value + kv_head * p->value_head, p->value_token, s, upright_v, NULL);
        for (size head = kv_head * repeat; head < (kv_head + 1) * repeat; head++)
            for (size first = 0; first < p->length[s]; first += STRIPE) {
                size rows = p->length[s] - first < STRIPE ? p->length[s] - first : STRIPE;
                size token = p->start[s] + first, seen = ahead + first + rows;
                const float *query = p->query + head * p->query_head + token * p->query_token;
                const float *grad = p->grad + (token * p->heads + head) * D;
                const float *out = p->out + (token * p->heads + head) * D;
                float *of_query = p->of_query + token * p->of_query_token + head * D;
                scored(query, p->query_token, upright_k, blocks, probs, rows, seen, D);
                scored(grad, wide, upright_v, blocks, back, rows, seen, D);
                for (size i = 0; i < rows; i++) {
                    float *w = probs + i * blocks, *b = back + i * blocks, along = 0;
                    float sum = p->log_sum[head * p->tokens + token + i];
                    size mine = seen - rows + i + 1, whole = (mine + LANES - 1) / LANES * LANES; /* in the row's last block */
#pragma omp simd reduction(+ : along)
                    for (size d = 0; d < D; d++) along += grad[i * wide + d] * out[i * wide + d];
#pragma omp simd
                    for (size at = 0; at < whole; at++) {
                        w[at] = exponential(w[at] * p->scaling - sum);
                        b[at] = w[at] * (b[at] - along) * p->scaling;
                    }
                    memset(w + mine, 0, (seen - mine) * sizeof(float));
                    memset(b + mine, 0, (seen - mine) * sizeof(float));
                }
                seen_by(back, blocks, flat_k, of_query, p->of_query_token, rows, seen, D);
                given_to(probs, blocks, grad, wide, of_v, rows, seen, D);
                given_to(back, blocks, query, p->query_token, of_k, rows, seen, D);
            }
        for (size at = 0; at < p->length[s]; at++) { /* nobody else sees these */
            size to = (p->start[s] + at) * p->of_key_token + kv_head * D;
            memcpy(p->of_key + to, of_k + (ahead + at) * D, D * sizeof(float));
            memcpy(p->of_value + to, of_v + (ahead + at) * D, D * sizeof(float));
        }
        memset(of_k + ahead * D, 0, p->length[s] * D * sizeof(float));
        memset(of_v + ahead * D, 0, p->length[s] * D * sizeof(float));
    }
    float *before = p->before + (part * p->kv_heads + kv_head) * 2 * p->longest * D;
    memcpy(before, of_k, ahead * D * sizeof(float));
    memcpy(before + p->longest * D, of_v, ahead * D * sizeof(float));
}

/* The gradients of queries, keys and values from that of the result. */
void attend_pass_backward(const Pass *p) {
    size D = p->width;
#pragma omp parallel for num_threads(p->threads) schedule(static)
    for (int thread = 0; thread < p->threads; thread++)
        for (size task = thread; task < p->parts * p->kv_heads; task += p->threads) {
            float *room = p->room + thread * p->space;
            if (D == 64) backward(p, task / p->kv_heads, task % p->kv_heads, room, 64);
            else backward(p, task / p->kv_heads, task % p->kv_heads, room, D);
        }
    for (size part = 0; part < p->parts; part++) /* in order: what a part's sequences see before themselves */
        for (size head = 0; head < p->kv_heads; head++) {
            const float *before = p->before + (part * p->kv_heads + head) * 2 * p->longest * D;
            for (size at = 0; at < prefix(p, p->first[part]); at++) {
                size to = token_of(p, p->first[part], at) * p->of_key_token + head * D;
                for (size d = 0; d < D; d++) p->of_key[to + d] += before[at * D + d];
                for (size d = 0; d < D; d++) p->of_value[to + d] += before[(p->longest + at) * D + d];
            }
        }
}

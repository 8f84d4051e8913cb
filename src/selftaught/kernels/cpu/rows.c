/* Passes over rows of logits: statistics, divergences and their gradients, as rows.py has them for a GPU.

   A row is read where it lies and never stored again. `scale` multiplies logits as they are read (1 / temperature). A
   token of probability 0 under P adds 0 to KL(P||Q), one that is impossible under Q alone makes it infinite. Sums are
   float32 within a stretch and double across, so that they do not lose by the vocabulary's size. */

#include <float.h>

#include "common.h"

#define STRETCH 4096 /* logits whose sums are kept in float32 */

typedef struct {
    const float *z;
    size stride;
    float scale;
} Logits; /* (n, V), rows `stride` apart */

typedef struct {
    Logits of;
    const float *lse;
} Side; /* log-probs (n, V): scaled logits less their log-sum-exp */

/* log x to 2 units in the last place, by the polynomial of Cephes' logf. */
INLINE float logarithm(float x) {
    union { float value; int32_t bits; } u = {x};
    int32_t shifted = u.bits - 0x3f3504f3; /* sqrt(1/2), so that the mantissa lies around 1 */
    float k = (float)(shifted >> 23);
    u.bits = (shifted & 0x007fffff) + 0x3f3504f3;
    float r = u.value - 1.0f, square = r * r, p = 7.0376836292e-2f;
    p = p * r - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    float y = p * r * square + k * -2.12194440e-4f - 0.5f * square;
    return x == 0.0f ? -INFINITY : x > 0.0f ? r + y + k * 0.693359375f : NAN;
}

INLINE float weighed(float e, float x) { return e == 0.0f ? 0.0f : e * x; } /* NaN stays: a step is then refused */
INLINE float raised(float x, float low) { return x < low ? low : x; }
INLINE float bounded(float x) { return x == -INFINITY ? 0.0f : x; }

/* log(weight e^a + (1 - weight) e^b), -inf where both are. */
INLINE float log_mean(float a, float b, float weight) {
    float high = bounded(a > b ? a : b);
    return high + logarithm(weight * exponential(a - high) + (1.0f - weight) * exponential(b - high));
}

/* The largest of what `named` does not name, if it is given. */
INLINE float highest(const float *z, size V, float scale, const uint8_t *named) {
    float most = -FLT_MAX; /* finite, where all are impossible: nothing is inf - inf */
#pragma omp simd reduction(max : most)
    for (size v = 0; v < V; v++) {
        float x = named && named[v] ? -FLT_MAX : z[v] * scale;
        most = x > most ? x : most;
    }
    return most;
}

/* sum e^(z - high), and sum e^(z - high) (z - high), over the same. */
INLINE void summed(const float *z, size V, float scale, float high, const uint8_t *named, double *mass, double *dot) {
    *mass = *dot = 0;
    for (size first = 0; first < V; first += STRETCH) {
        size end = first + STRETCH < V ? first + STRETCH : V;
        float some = 0, along = 0;
#pragma omp simd reduction(+ : some, along)
        for (size v = first; v < end; v++) {
            float x = named && named[v] ? -INFINITY : z[v] * scale - high, e = exponential(x);
            some += e;
            along += weighed(e, x);
        }
        *mass += some, *dot += along;
    }
}

INLINE float at_token(const float *z, size V, float scale, size token) {
    return token >= 0 && token < V ? z[token] * scale : NAN;
}


typedef struct {
    float *lse, *logp, *entropy;
} Statistics;

INLINE void note(Statistics to, size i, float high, double mass, double dot, float at) {
    to.lse[i] = (float)(high + log(mass)), to.logp[i] = (float)((double)at - high - log(mass));
    to.entropy[i] = (float)(log(mass) - dot / mass);
}

void row_statistics(const Logits *l, const size *tokens, size n, size V, const Statistics *to, int threads) {
    const float scale = l->scale; /* what is stored might lie where it does */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size i = 0; i < n; i++) {
        const float *z = l->z + i * l->stride;
        float high = highest(z, V, scale, NULL);
        double mass, dot;
        summed(z, V, scale, high, NULL, &mass, &dot);
        note(*to, i, high, mass, dot, at_token(z, V, scale, tokens[i]));
    }
}

/* grad (1[v = token] - p_v) scale */
void row_sampled_gradient(const Logits *l, const size *tokens, const float *lse, const float *grad, float *out, size n,
                      size V, int threads) {
    const float scale = l->scale; /* what is stored might lie where it does */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size i = 0; i < n; i++) {
        const float *z = l->z + i * l->stride;
        float *to = out + i * V, share = -grad[i] * scale, less = lse[i];
#pragma omp simd
        for (size v = 0; v < V; v++) to[v] = share * exponential(z[v] * scale - less);
        if (tokens[i] >= 0 && tokens[i] < V) to[tokens[i]] -= share;
    }
}

/* ---- buckets: the k likeliest tokens, and all others together ---- */

void row_buckets(const Logits *l, const size *tokens, const uint8_t *named, const size *top, size k, size n, size V,
             float *out, float *rest, const Statistics *to, int threads) {
    const float scale = l->scale; /* what is stored might lie where it does */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size i = 0; i < n; i++) {
        const float *z = l->z + i * l->stride;
        const size *few = top + i * k;
        float high = highest(z, V, scale, named + i * V), *values = out + i * (k + 1);
        double mass, dot;
        summed(z, V, scale, high, named + i * V, &mass, &dot);
        rest[i] = high + (float)log(mass);
        float top_high = high; /* the top comes last, as all others may lie far below it */
        for (size j = 0; j < k; j++) top_high = z[few[j]] * scale > top_high ? z[few[j]] * scale : top_high;
        double shift = (double)high - top_high, fade = exp(shift);
        dot = fade > 0 ? fade * (dot + mass * shift) : 0, mass *= fade;
        for (size j = 0; j < k; j++) {
            double x = (double)(z[few[j]] * scale) - top_high, e = exp(x);
            mass += e, dot += e > 0 ? e * x : 0;
        }
        note(*to, i, top_high, mass, dot, at_token(z, V, scale, tokens[i]));
        for (size j = 0; j < k; j++) values[j] = z[few[j]] * scale - to->lse[i];
        values[k] = rest[i] - to->lse[i];
    }
}

void row_buckets_gradient(const Logits *l, const float *lse, const float *rest, const size *top, size k, const float *grad,
                      float *out, size n, size V, int threads) {
    const float scale = l->scale; /* what is stored might lie where it does */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size i = 0; i < n; i++) {
        const float *z = l->z + i * l->stride, *g = grad + i * (k + 1);
        float *to = out + i * V, total = 0, less = lse[i], others = bounded(rest[i]), tail = g[k] * scale;
        for (size j = 0; j <= k; j++) total += g[j];
        total *= scale;
        float share = tail - total * expf(rest[i] - less); /* of the others' own softmax */
#pragma omp simd
        for (size v = 0; v < V; v++) to[v] = share * exponential(z[v] * scale - others);
        for (size j = 0; j < k; j++) {
            size v = top[i * k + j];
            to[v] = g[j] * scale - total * exponential(z[v] * scale - less);
        }
    }
}

/* ---- two sides ---- */

/* KL(P||Q), and the statistics of both. */
void row_kl(const Logits *p, const Logits *q, const size *tokens, size n, size V, float *out, const Statistics *of_p,
        const Statistics *of_q, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size i = 0; i < n; i++) {
        const float *a = p->z + i * p->stride, *b = q->z + i * q->stride;
        float p_high = highest(a, V, p->scale, NULL), q_high = highest(b, V, q->scale, NULL);
        double p_mass = 0, q_mass = 0, p_dot = 0, q_dot = 0, gap = 0;
        for (size first = 0; first < V; first += STRETCH) {
            size end = first + STRETCH < V ? first + STRETCH : V;
            float pm = 0, qm = 0, pd = 0, qd = 0, g = 0; /* g of equal sides is 0, however it is rounded */
#pragma omp simd reduction(+ : pm, qm, pd, qd, g)
            for (size v = first; v < end; v++) {
                float x = a[v] * p->scale - p_high, y = b[v] * q->scale - q_high;
                float e = exponential(x), f = exponential(y);
                pm += e, qm += f, pd += weighed(e, x), qd += weighed(f, y), g += weighed(e, x - y);
            }
            p_mass += pm, q_mass += qm, p_dot += pd, q_dot += qd, gap += g;
        }
        out[i] = (float)(gap / p_mass + (log(q_mass) - log(p_mass)));
        note(*of_p, i, p_high, p_mass, p_dot, at_token(a, V, p->scale, tokens[i]));
        note(*of_q, i, q_high, q_mass, q_dot, at_token(b, V, q->scale, tokens[i]));
    }
}

/* KL(P||M) and KL(Q||M), M = weight P + (1 - weight) Q, of log-probs raised to `low`. */
void row_js(const Logits *p, const Logits *q, const float *p_lse, const float *q_lse, float weight, float low, size n,
        size V, float *of_p, float *of_q, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size i = 0; i < n; i++) {
        const float *a = p->z + i * p->stride, *b = q->z + i * q->stride;
        float less_p = p_lse[i], less_q = q_lse[i];
        double p_sum = 0, q_sum = 0;
        for (size first = 0; first < V; first += STRETCH) {
            size end = first + STRETCH < V ? first + STRETCH : V;
            float ps = 0, qs = 0;
#pragma omp simd reduction(+ : ps, qs)
            for (size v = first; v < end; v++) {
                float x = raised(a[v] * p->scale - less_p, low), y = raised(b[v] * q->scale - less_q, low);
                float m = log_mean(x, y, weight);
                ps += weighed(exponential(x), x - m), qs += weighed(exponential(y), y - m);
            }
            p_sum += ps, q_sum += qs;
        }
        of_p[i] = (float)p_sum, of_q[i] = (float)q_sum;
    }
}

/* sum_v min(P_v log(P_v / Q_v), clip), and the mass of P whose summands are not capped. */
void row_clipped(const Logits *p, const Logits *q, const float *p_lse, const float *q_lse, float clip, size n, size V,
             float *out, float *mass, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size i = 0; i < n; i++) {
        const float *a = p->z + i * p->stride, *b = q->z + i * q->stride;
        const float p_scale = p->scale, q_scale = q->scale;
        float less_p = p_lse[i], less_q = q_lse[i];
        double sum = 0, kept = 0;
        for (size first = 0; first < V; first += STRETCH) {
            size end = first + STRETCH < V ? first + STRETCH : V;
            float s = 0, k = 0;
#pragma omp simd reduction(+ : s, k)
            for (size v = first; v < end; v++) {
                float x = a[v] * p_scale - less_p, e = exponential(x);
                float term = weighed(e, x - (b[v] * q_scale - less_q)), whole = term > clip ? 0.0f : 1.0f;
                s += term > clip ? clip : term, k += whole * e; /* not a sum of a choice: gcc 12 has no vectors for it */
            }
            sum += s, kept += k;
        }
        out[i] = (float)sum, mass[i] = (float)kept;
    }
}

/* ---- three sides: the barycenter B, in proportion to T^(1 - share) R^share ---- */

INLINE float times(float share, float x) { return share == 0.0f ? 0.0f : share * x; } /* P^0 is 1, also of P = 0 */

/* log T^(1 - share) R^share of log-probs raised to `low`; -inf where S holds it to be impossible too. */
INLINE float blended(float s, float t, float r, float share, float low) {
    float b = times(1.0f - share, raised(t, low)) + times(share, raised(r, low));
    return s == -INFINITY && t == -INFINITY && r == -INFINITY ? -INFINITY : b;
}

typedef struct {
    const float *s, *t, *r; /* a row of each */
    float s_scale, t_scale, r_scale, s_lse, t_lse, r_lse, share, low;
} Three;

INLINE Three three(const Side *s, const Side *t, const Side *r, const float *share, float low, size i) {
    return (Three){s->of.z + i * s->of.stride, t->of.z + i * t->of.stride, r->of.z + i * r->of.stride, s->of.scale,
                   t->of.scale, r->of.scale, s->lse[i], t->lse[i], r->lse[i], share[i], low};
}

INLINE float of_s(Three o, size v) { return o.s[v] * o.s_scale - o.s_lse; }
INLINE float of_b(Three o, size v) {
    return blended(of_s(o, v), o.t[v] * o.t_scale - o.t_lse, o.r[v] * o.r_scale - o.r_lse, o.share, o.low);
}

/* KL(S||B), and the log of B's mass. */
void row_blend(const Side *s, const Side *t, const Side *r, const float *share, float low, size n, size V, float *out,
               float *log_mass, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size i = 0; i < n; i++) {
        const Three o = three(s, t, r, share, low, i);
        float high = -FLT_MAX;
#pragma omp simd reduction(max : high)
        for (size v = 0; v < V; v++) {
            float b = of_b(o, v);
            high = b > high ? b : high;
        }
        double mass = 0, gap = 0;
        for (size first = 0; first < V; first += STRETCH) {
            size end = first + STRETCH < V ? first + STRETCH : V;
            float m = 0, g = 0;
#pragma omp simd reduction(+ : m, g)
            for (size v = first; v < end; v++) {
                float x = of_s(o, v), b = of_b(o, v);
                m += exponential(b - high), g += weighed(exponential(x), x - b);
            }
            mass += m, gap += g;
        }
        log_mass[i] = (float)(high + log(mass)), out[i] = (float)(gap + high + log(mass));
    }
}

/* Its gradient in the logits of S; B is constant, and a row whose own gradient is 0 is not read. */
void row_blend_gradient(const Side *s, const Side *t, const Side *r, const float *share, float low, const float *value,
                        const float *log_mass, const float *grad, float *out, size n, size V, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size i = 0; i < n; i++) {
        const Three o = three(s, t, r, share, low, i);
        float *to = out + i * V, by = grad[i] * o.s_scale, less = value[i] - log_mass[i];
        if (grad[i] == 0.0f) memset(to, 0, V * sizeof(float));
        else
#pragma omp simd
            for (size v = 0; v < V; v++) to[v] = by * weighed(exponential(of_s(o, v)), of_s(o, v) - of_b(o, v) - less);
    }
}

enum { KL_TO, KL_FROM, JS, CLIPPED };

INLINE float slope(int kind, float s, float t, float known, float number) {
    if (kind == KL_TO) return exponential(s) - exponential(t); /* of KL(T||S) */
    if (kind == KL_FROM) return weighed(exponential(s), s - t - known); /* of KL(S||T), which is `known` */
    if (kind == JS) /* `number` is the weight of S, `known` KL(S||M) */
        return number * weighed(exponential(s), s - log_mean(s, t, number) - known);
    float e = exponential(t); /* of KL(T||S) with summands capped at `number`, `known` the mass of those that are not */
    return exponential(s) * known - (weighed(e, t - s) > number ? 0.0f : e);
}

INLINE void slopes(int kind, const float *s, const float *t, float s_scale, float t_scale, float s_lse, float t_lse,
                   float grad, float known, float number, float *out, size V) {
#pragma omp simd
    for (size v = 0; v < V; v++)
        out[v] = grad * slope(kind, s[v] * s_scale - s_lse, t[v] * t_scale - t_lse, known, number);
}

/* The gradient in the logits of S; a row whose own gradient is 0 is not read. */
void row_gradient(int kind, const Logits *s, const Logits *t, const float *s_lse, const float *t_lse, const float *grad,
              const float *known, float number, float *out, size n, size V, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size i = 0; i < n; i++) {
        const float *a = s->z + i * s->stride, *b = t->z + i * t->stride;
        float *to = out + i * V, by = grad[i] * s->scale, x = s_lse[i], y = t_lse[i], it = known[i];
        if (grad[i] == 0.0f) memset(to, 0, V * sizeof(float));
        else if (kind == KL_TO) slopes(KL_TO, a, b, s->scale, t->scale, x, y, by, it, number, to, V);
        else if (kind == KL_FROM) slopes(KL_FROM, a, b, s->scale, t->scale, x, y, by, it, number, to, V);
        else if (kind == JS) slopes(JS, a, b, s->scale, t->scale, x, y, by, it, number, to, V);
        else slopes(CLIPPED, a, b, s->scale, t->scale, x, y, by, it, number, to, V);
    }
}

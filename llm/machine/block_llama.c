/* The parts of a llama's block between its matrix products: see llm/machine/fused_llama.py. */
#include "block.h"

static inline float sum_of_squares(const float *x, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

/* sum = x + added (added may be absent: then sum is x), y = RMSNorm(sum). x, sum, y: (rows, width). */
void norm(const float *x, const bf16 *added, float *sum, const float *weight, bf16 *y, float *scales, float eps,
          int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *row = x + r * width;
        if (added) {
            float *total = sum + r * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) total[i] = row[i] + value(added[r * width + i]);
            row = total;
        }
        float scale = 1 / __builtin_sqrtf(sum_of_squares(row, width) / width + eps);
        scales[r] = scale;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) y[r * width + i] = rounded(row[i] * scale * weight[i]);
    }
}

/* dx = passed + the gradient that dy gives to x through the norm, also rounded; dweights: (PARTS, width). */
void norm_backward(const bf16 *dy, const float *x, const float *weight, const float *scales, const float *passed,
                   float *dx, bf16 *dx_rounded, float *dweights, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < PARTS; part++) {
        float *dweight = dweights + part * width;
        for (int64_t i = 0; i < width; i++) dweight[i] = 0;
        for (int64_t r = part * rows / PARTS; r < (part + 1) * rows / PARTS; r++) {
            const float *in = x + r * width;
            const bf16 *d = dy + r * width;
            float scale = scales[r], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < width; i++) dot += value(d[i]) * weight[i] * in[i];
            dot *= scale * scale / width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float g = value(d[i]);
                float out = passed[r * width + i] + scale * (g * weight[i] - in[i] * dot);
                dweight[i] += g * in[i] * scale;
                dx[r * width + i] = out;
                dx_rounded[r * width + i] = rounded(out);
            }
        }
    }
}

/* One head of one token: normed (weight may be absent: then not), then rotated. z, y: (size). */
INLINE void turn(const bf16 *z, bf16 *y, const float *weight, float *scale, const float *cosine,
                        const float *sine, float eps, int64_t size) {
    int64_t half = size / 2;
    float x[size], square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < size; i++) {
        x[i] = value(z[i]);
        square += x[i] * x[i];
    }
    if (weight) {
        *scale = 1 / __builtin_sqrtf(square / size + eps);
#pragma omp simd
        for (int64_t i = 0; i < size; i++) x[i] *= *scale * weight[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        y[i] = rounded(x[i] * cosine[i] - x[i + half] * sine[i]);
        y[i + half] = rounded(x[i + half] * cosine[i] + x[i] * sine[i]);
    }
}

INLINE void turn_back(const bf16 *dy, const bf16 *z, bf16 *dz, const float *weight, float scale, float *dweight,
                             const float *cosine, const float *sine, int64_t size) {
    int64_t half = size / 2;
    float d[size], dot = 0;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float a = value(dy[i]), b = value(dy[i + half]);
        d[i] = a * cosine[i] + b * sine[i];
        d[i + half] = b * cosine[i] - a * sine[i];
    }
    if (weight) {
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < size; i++) {
            float x = value(z[i]);
            dweight[i] += d[i] * x * scale;
            d[i] *= weight[i];
            dot += d[i] * x;
        }
        dot *= scale * scale / size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) d[i] = scale * (d[i] - value(z[i]) * dot);
    }
#pragma omp simd
    for (int64_t i = 0; i < size; i++) dz[i] = rounded(d[i]);
}

/* Where head h of token (b, t) stands among heads: first all queries (batch, queries, time, size), then all keys
   (batch, keys, time, size), then all values. */
static inline int64_t place(int64_t b, int64_t h, int64_t t, int64_t batch, int64_t time, int64_t queries, int64_t keys) {
    if (h < queries) return (b * queries + h) * time + t;
    int64_t kind = (h - queries) / keys; /* 0: keys, 1: values */
    return batch * time * (queries + kind * keys) + (b * keys + (h - queries) % keys) * time + t;
}

typedef struct {
    int64_t batch, time, queries, keys;
    const float *weights, *cosine, *sine; /* weights: (2, size), of queries and of keys, or absent */
} attention;

/* The usual sizes of a head as constants: twice as fast. */
#define WITH_SIZE(function, ...) \
    (size == 32 ? function(__VA_ARGS__, 32) : size == 64 ? function(__VA_ARGS__, 64) : function(__VA_ARGS__, size))

INLINE void split_token(const attention *a, int64_t token, const bf16 *joined, bf16 *heads, float *scales, float eps,
                        int64_t size) {
    int64_t all = a->queries + 2 * a->keys, turned = a->queries + a->keys, t = token % a->time;
    for (int64_t h = 0; h < all; h++) {
        const bf16 *z = joined + (token * all + h) * size;
        bf16 *y = heads + place(token / a->time, h, t, a->batch, a->time, a->queries, a->keys) * size;
        if (h < turned)
            turn(z, y, a->weights ? a->weights + (h < a->queries ? 0 : size) : 0, scales + token * turned + h,
                 a->cosine + t * size / 2, a->sine + t * size / 2, eps, size);
        else
            for (int64_t i = 0; i < size; i++) y[i] = z[i];
    }
}

/* joined: (batch, time, queries + 2 keys, size). heads: as in `place`, with queries and keys normed and rotated.
   scales: (batch, time, queries + keys). */
void split_heads(const bf16 *joined, bf16 *heads, const float *weights, float *scales, const float *cosine,
                 const float *sine, float eps, int64_t batch, int64_t time, int64_t queries, int64_t keys, int64_t size) {
    attention a = { batch, time, queries, keys, weights, cosine, sine };
#pragma omp parallel for schedule(static)
    for (int64_t token = 0; token < batch * time; token++)
        WITH_SIZE(split_token, &a, token, joined, heads, scales, eps);
}

INLINE void split_token_backward(const attention *a, int64_t token, const bf16 *dheads, const bf16 *joined,
                                 bf16 *djoined, const float *scales, float *dweight, int64_t size) {
    int64_t all = a->queries + 2 * a->keys, turned = a->queries + a->keys, t = token % a->time;
    for (int64_t h = 0; h < all; h++) {
        int64_t at = (token * all + h) * size, of_key = h < a->queries ? 0 : size;
        const bf16 *dy = dheads + place(token / a->time, h, t, a->batch, a->time, a->queries, a->keys) * size;
        if (h < turned)
            turn_back(dy, joined + at, djoined + at, a->weights ? a->weights + of_key : 0, scales[token * turned + h],
                      dweight + of_key, a->cosine + t * size / 2, a->sine + t * size / 2, size);
        else
            for (int64_t i = 0; i < size; i++) djoined[at + i] = dy[i];
    }
}

/* dweights: (PARTS, 2, size). */
void split_heads_backward(const bf16 *dheads, const bf16 *joined, bf16 *djoined, const float *weights,
                          const float *scales, float *dweights, const float *cosine, const float *sine, int64_t batch,
                          int64_t time, int64_t queries, int64_t keys, int64_t size) {
    attention a = { batch, time, queries, keys, weights, cosine, sine };
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < PARTS; part++) {
        float *dweight = dweights + part * 2 * size;
        for (int64_t i = 0; i < 2 * size; i++) dweight[i] = 0;
        for (int64_t token = part * batch * time / PARTS; token < (part + 1) * batch * time / PARTS; token++)
            WITH_SIZE(split_token_backward, &a, token, dheads, joined, djoined, scales, dweight);
    }
}

/* joined: (rows, 2 width), gates and values; y = silu(gate) * up: (rows, width). */
void swiglu(const bf16 *joined, bf16 *y, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *gate = joined + 2 * r * width, *up = gate + width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float g = value(gate[i]);
            y[r * width + i] = rounded(g / (1 + exponential(-g)) * value(up[i]));
        }
    }
}

/* Also y again, so that the forward pass need not keep it. */
void swiglu_backward(const bf16 *joined, const bf16 *dy, bf16 *djoined, bf16 *y, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *gate = joined + 2 * r * width, *up = gate + width;
        bf16 *dgate = djoined + 2 * r * width, *dup = dgate + width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float g = value(gate[i]), u = value(up[i]), d = value(dy[r * width + i]);
            float s = 1 / (1 + exponential(-g)), silu = g * s;
            y[r * width + i] = rounded(silu * u);
            dup[i] = rounded(d * silu);
            dgate[i] = rounded(d * u * s * (1 + g - silu));
        }
    }
}

/* The parts of any block between its matrix products: see llm/machine/fused_block.py. */
#include "block.h"

void add(const float *x, const bf16 *y, float *sum, int64_t n) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) sum[i] = x[i] + value(y[i]);
}

void round_all(const float *x, bf16 *y, int64_t n) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) y[i] = rounded(x[i]);
}

/* out[b, j, i] = in[b, i, j], each a vector of `size`. */
void swap_axes(const bf16 *in, bf16 *out, int64_t batch, int64_t rows, int64_t columns, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t j = 0; j < columns; j++)
            for (int64_t i = 0; i < rows; i++)
                for (int64_t c = 0; c < size; c++)
                    out[((b * columns + j) * rows + i) * size + c] = in[((b * rows + i) * columns + j) * size + c];
}

enum { LANES = 16 };

/* Columns to compute of a row that sees `seen`: whole vectors, since the rest of a loop is slow. */
static inline int64_t whole(int64_t seen, int64_t time) {
    int64_t wide = (seen + LANES - 1) / LANES * LANES;
    return wide < time ? wide : time;
}

static inline uint32_t mixed(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352d;
    x = (x ^ x >> 15) * 0x846ca68b;
    return x ^ x >> 16;
}

/* What x, element i of a window with this key, becomes by the dropout of model.Dropout: scaled, or 0. */
static inline bf16 dropped(bf16 x, uint32_t i, uint32_t key, int32_t threshold, float scale) {
    uint32_t bits = (key ^ mixed(i)) * 0x7feb352d;
    bits = (bits ^ bits >> 15) * 0x846ca68b;
    return (int32_t)bits >= threshold ? rounded(value(x) * scale) : 0;
}

/* x, y: (windows, size); keys: of the windows, mixed. */
void drop(const bf16 *x, bf16 *y, const uint32_t *keys, int64_t threshold, float scale, int64_t windows, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t w = 0; w < windows; w++) {
        uint32_t key = keys[w];
        int32_t least = threshold;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) y[w * size + i] = dropped(x[w * size + i], i, key, least, scale);
    }
}

/* Causal softmax of factor * scores (windows, heads, time, time), in place: row t sees columns up to t. kept: the same
   after dropout; absent, as the keys, if nothing is dropped. rows: of a window, heads * time. */
void softmax(bf16 *scores, bf16 *kept, const uint32_t *keys, int64_t threshold, float scale, float factor,
             int64_t windows, int64_t rows, int64_t time) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < windows * rows; r++) {
        bf16 *row = scores + r * time;
        int64_t seen = r % time + 1, wide = whole(seen, time);
        float x[wide], top = value(row[0]), sum = 0;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < wide; i++) {
            x[i] = i < seen ? value(row[i]) : -__builtin_inff();
            top = x[i] > top ? x[i] : top;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < wide; i++) {
            x[i] = i < seen ? exponential(factor * (x[i] - top)) : 0;
            sum += x[i];
        }
        sum = 1 / sum;
#pragma omp simd
        for (int64_t i = 0; i < wide; i++) row[i] = rounded(x[i] * sum);
        for (int64_t i = wide; i < time; i++) row[i] = 0;
        if (kept) {
            bf16 *out = kept + r * time;
            uint32_t key = keys[r / rows], first = r % rows * time;
            int32_t least = threshold;
#pragma omp simd
            for (int64_t i = 0; i < wide; i++) out[i] = dropped(row[i], first + (uint32_t)i, key, least, scale);
            for (int64_t i = wide; i < time; i++) out[i] = 0;
        }
    }
}

/* d: the gradient of what `softmax` made, after dropout if there is any, and in place that of the scores. kept: again
   the result after dropout. */
void softmax_backward(const bf16 *result, bf16 *d, bf16 *kept, const uint32_t *keys, int64_t threshold, float scale,
                      float factor, int64_t windows, int64_t rows, int64_t time) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < windows * rows; r++) {
        const bf16 *p = result + r * time;
        bf16 *row = d + r * time;
        int64_t wide = whole(r % time + 1, time);
        float dot = 0;
        if (kept) {
            bf16 *out = kept + r * time;
            uint32_t key = keys[r / rows], first = r % rows * time;
            int32_t least = threshold;
#pragma omp simd
            for (int64_t i = 0; i < wide; i++) {
                out[i] = dropped(p[i], first + (uint32_t)i, key, least, scale);
                row[i] = dropped(row[i], first + (uint32_t)i, key, least, scale);
            }
            for (int64_t i = wide; i < time; i++) out[i] = 0;
        }
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < wide; i++) dot += value(p[i]) * value(row[i]);
#pragma omp simd
        for (int64_t i = 0; i < wide; i++) row[i] = rounded(factor * value(p[i]) * (value(row[i]) - dot));
        for (int64_t i = wide; i < time; i++) row[i] = 0;
    }
}

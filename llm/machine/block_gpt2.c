/* The parts of GPT-2's block between its matrix products: see llm/machine/fused_gpt2.py.

   sums: partial sums over rows, (PARTS, stride), of which a function writes as many columns as its result has. */
#include "block.h"

static inline int64_t first_row(int64_t part, int64_t rows) { return part * rows / PARTS; }

/* sum = x + added (added may be absent: then sum is x), y = LayerNorm(sum). x, sum, y: (rows, width).
   scales: (rows, 2), the mean of each row and 1 / its standard deviation. */
void layer_norm(const float *x, const bf16 *added, float *sum, const float *weight, const float *bias, bf16 *y,
                float *scales, float eps, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *row = x + r * width;
        float mean = 0, square = 0;
        if (added) {
            float *total = sum + r * width;
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < width; i++) mean += total[i] = row[i] + value(added[r * width + i]);
            row = total;
        } else {
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < width; i++) mean += row[i];
        }
        mean /= width;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < width; i++) square += (row[i] - mean) * (row[i] - mean);
        float scale = 1 / __builtin_sqrtf(square / width + eps);
        scales[2 * r] = mean;
        scales[2 * r + 1] = scale;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) y[r * width + i] = rounded((row[i] - mean) * scale * weight[i] + bias[i]);
    }
}

/* dx = passed + the gradient that dy gives to x through the norm, also rounded. sums: of the weight's gradient, then of
   the bias's. */
void layer_norm_backward(const bf16 *dy, const float *x, const float *weight, const float *scales, const float *passed,
                         float *dx, bf16 *dx_rounded, float *sums, int64_t stride, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < PARTS; part++) {
        float *dweight = sums + part * stride, *dbias = dweight + width;
        for (int64_t i = 0; i < 2 * width; i++) dweight[i] = 0;
        for (int64_t r = first_row(part, rows); r < first_row(part + 1, rows); r++) {
            const float *in = x + r * width;
            const bf16 *d = dy + r * width;
            float mean = scales[2 * r], scale = scales[2 * r + 1], total = 0, dot = 0;
#pragma omp simd reduction(+ : total, dot)
            for (int64_t i = 0; i < width; i++) {
                float g = value(d[i]) * weight[i];
                total += g;
                dot += g * (in[i] - mean);
            }
            total /= width;
            dot *= scale * scale / width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float g = value(d[i]), centred = in[i] - mean;
                float out = passed[r * width + i] + scale * (g * weight[i] - total - centred * dot);
                dweight[i] += g * centred * scale;
                dbias[i] += g;
                dx[r * width + i] = out;
                dx_rounded[r * width + i] = rounded(out);
            }
        }
    }
}

/* x times the normal distribution function: 1 - erf's rational approximation 7.1.26 of Abramowitz and Stegun (1964), with
   an error of 1.5e-7. *slope: the derivative. */
static inline float gelu_exact(float x, float *slope) {
    float bell = exponential(-0.5f * x * x), t = 1 / (1 + 0.231641889f * __builtin_fabsf(x));
    float tail = t * (0.127414796f + t * (-0.142248368f + t * (0.710706870f + t * (-0.726576014f + t * 0.530702714f))));
    float below = x > 0 ? 1 - tail * bell : tail * bell;
    *slope = below + x * bell * 0.398942280f;
    return x * below;
}

/* By tanh(u) = 2 / (1 + exp(-2u)) - 1, as GPT-2's. */
static inline float gelu_tanh(float x, float *slope) {
    float square = x * x, u = 1.59576912f * x * (1 + 0.044715f * square);
    float s = 1 / (1 + exponential(-u));
    *slope = s + x * s * (1 - s) * 1.59576912f * (1 + 3 * 0.044715f * square);
    return x * s;
}

/* y = GELU(x + bias), and x becomes the derivative there. x, y: (rows, width). */
void gelu(bf16 *x, const float *bias, bf16 *y, int64_t by_tanh, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        bf16 *in = x + r * width, *out = y + r * width;
        float slope;
        if (by_tanh)
#pragma omp simd private(slope)
            for (int64_t i = 0; i < width; i++) {
                out[i] = rounded(gelu_tanh(value(in[i]) + bias[i], &slope));
                in[i] = rounded(slope);
            }
        else
#pragma omp simd private(slope)
            for (int64_t i = 0; i < width; i++) {
                out[i] = rounded(gelu_exact(value(in[i]) + bias[i], &slope));
                in[i] = rounded(slope);
            }
    }
}

/* d times slope, in place, and its sums: the gradient of the bias. d, slope: (rows, width). */
void gelu_backward(bf16 *d, const bf16 *slope, float *sums, int64_t stride, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < PARTS; part++) {
        float *sum = sums + part * stride;
        for (int64_t i = 0; i < width; i++) sum[i] = 0;
        for (int64_t r = first_row(part, rows); r < first_row(part + 1, rows); r++)
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float out = value(d[r * width + i]) * value(slope[r * width + i]);
                sum[i] += out;
                d[r * width + i] = rounded(out);
            }
    }
}

/* d: (rows, width). */
void sum_rows(const bf16 *d, float *sums, int64_t stride, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < PARTS; part++) {
        float *sum = sums + part * stride;
        for (int64_t i = 0; i < width; i++) sum[i] = 0;
        for (int64_t r = first_row(part, rows); r < first_row(part + 1, rows); r++)
#pragma omp simd
            for (int64_t i = 0; i < width; i++) sum[i] += value(d[r * width + i]);
    }
}

/* exp(x - its row's shift) of bfloat16, in place, and the sum of each row, in one pass: see llm/kernel.py.

   exp(x) = 2^n 2^f with x log2(e) = n + f, n the nearest whole number, f in [-1/2, 1/2]; 2^f by a polynomial (through
   Chebyshev's points) whose error, 4e-6, is far below bfloat16's 2e-3. Nothing is below 2^-126; NaN and +inf give NaN. */
#include <stdint.h>

static inline float value(uint16_t x) {
    union { uint32_t bits; float value; } v = { (uint32_t)x << 16 };
    return v.value;
}

/* find: the shifts are the largest of each row, to be found here; else they are given */
void exp_sum(uint16_t *x, float *sums, float *shifts, int64_t find, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        uint16_t *row = x + r * width;
        float shift = shifts[r], sum = 0;
        if (find) {
            shift = value(row[0]);
#pragma omp simd reduction(max : shift)
            for (int64_t i = 0; i < width; i++) shift = value(row[i]) > shift ? value(row[i]) : shift;
            shifts[r] = shift;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) {
            union { uint32_t bits; float value; } y;
            float t = (value(row[i]) - shift) * 1.44269504f;
            t = t < -126.0f ? -126.0f : t;
            float n = __builtin_rintf(t), f = t - n;
            y.value = 1.0f + f * (0.693121045f + f * (0.24022349f + f * (0.0559219758f + f * 0.00966636852f)));
            y.bits += (uint32_t)(int32_t)n << 23;
            y.bits = (y.bits + 0x7fff + (y.bits >> 16 & 1)) & 0xffff0000; /* to the nearest, ties to even */
            row[i] = y.bits >> 16;
            sum += y.value;
        }
        sums[r] = sum;
    }
}

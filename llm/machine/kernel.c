/* Compute exp(x - shift of its row) in place, and the sum of each row, in one pass: see llm/machine/kernel.py.

   exp(x) = 2^n times an exponential near 1, where n is an integer. No result is below 2^-126. NaN and +inf give NaN. */
#include <stdint.h>

typedef union { uint32_t bits; float value; } number;

static inline float value(uint16_t x) {
    number v = { (uint32_t)x << 16 };
    return v.value;
}

/* bfloat16, row-major. Write x log2(e) = n + f with f in [-1/2, 1/2]; a polynomial (interpolated at the Chebyshev nodes)
   gives 2^f with an error of 4e-6, far below bfloat16's 2e-3.
   find_maximum: compute the shifts here, as the maximum of each row; else the caller gives them. */
void exp_sum(uint16_t *x, float *sums, float *shifts, int64_t find_maximum, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        uint16_t *row = x + r * width;
        float shift = shifts[r], sum = 0;
        if (find_maximum) {
            shift = value(row[0]);
#pragma omp simd reduction(max : shift)
            for (int64_t i = 0; i < width; i++) shift = value(row[i]) > shift ? value(row[i]) : shift;
            shifts[r] = shift;
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; i++) {
            number y;
            float t = (value(row[i]) - shift) * 1.44269504f;
            t = t < -126.0f ? -126.0f : t;
            float n = __builtin_rintf(t), f = t - n;
            y.value = 1.0f + f * (0.693121045f + f * (0.24022349f + f * (0.0559219758f + f * 0.00966636852f)));
            y.bits += (uint32_t)(int32_t)n << 23;
            y.bits = (y.bits + 0x7fff + (y.bits >> 16 & 1)) & 0xffff0000; /* round to nearest, ties to even */
            row[i] = y.bits >> 16;
            sum += y.value;
        }
        sums[r] = sum;
    }
}

enum {
    ROWS_TOGETHER = 32,   /* rows in one block */
    COLUMNS_TOGETHER = 64 /* columns in one partial sum of a row; long float sums would drift by rounding */
};

static inline void exp_sum_block(float *x, float *sums, const float *shifts, int64_t rows, int64_t width, int block) {
    float sum[ROWS_TOGETHER] = {0}, shift[ROWS_TOGETHER];
    for (int r = 0; r < block; r++) shift[r] = shifts[r];
    for (int64_t start = 0; start < width; start += COLUMNS_TOGETHER) {
        float part[ROWS_TOGETHER] = {0};
        for (int64_t i = start; i < width && i < start + COLUMNS_TOGETHER; i++) {
            float *column = x + i * rows;
#pragma omp simd
            for (int r = 0; r < block; r++) {
                number y;
                float t = column[r] - shift[r];
                t = t < -87.3365448f ? -87.3365448f : t;
                float n = __builtin_rintf(t * 1.44269504f), f = t - n * 0.693359375f + n * 2.12194440e-4f;
                y.value = 1 + f * (1 + f * (1.0f / 2 + f * (1.0f / 6 + f * (1.0f / 24 + f * (1.0f / 120 + f / 720)))));
                y.bits += (uint32_t)(int32_t)n << 23;
                part[r] += column[r] = y.value;
            }
        }
        for (int r = 0; r < block; r++) sum[r] += part[r];
    }
    for (int r = 0; r < block; r++) sums[r] = sum[r];
}

/* float32, column-major. Write x = n ln 2 + f. ln 2 is split into two parts such that n times the first part is exact
   (Cody and Waite 1980). exp(f) is its Taylor series, whose next term is below 2e-7. */
void exp_sum_columns(float *x, float *sums, const float *shifts, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r += ROWS_TOGETHER) {
        if (r + ROWS_TOGETHER <= rows) exp_sum_block(x + r, sums + r, shifts + r, rows, width, ROWS_TOGETHER);
        else exp_sum_block(x + r, sums + r, shifts + r, rows, width, rows - r);
    }
}

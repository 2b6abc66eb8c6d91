/* What the C files of the blocks share. Sums are in float32; bf16 is bfloat16.

   Gradients of vectors are summed over PARTS ranges of rows, then over these, so that they do not depend on the number
   of threads. */
#include <stdint.h>

typedef union { uint32_t bits; float value; } number;

static inline float value(uint16_t x) {
    number v = { (uint32_t)x << 16 };
    return v.value;
}

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

enum { PARTS = 16 };

static inline bf16 rounded(float x) {
    number v = { .value = x };
    return (v.bits + 0x7fff + (v.bits >> 16 & 1)) >> 16; /* to nearest, ties to even; a NaN that is computed stays one */
}

/* 2^(x log2(e)), with an error of 4e-6: as in kernel.c. */
static inline float exponential(float x) {
    number y;
    float t = x * 1.44269504f;
    t = t < -126.0f ? -126.0f : t > 126.0f ? 126.0f : t;
    float n = __builtin_rintf(t), f = t - n;
    y.value = 1.0f + f * (0.693121045f + f * (0.24022349f + f * (0.0559219758f + f * 0.00966636852f)));
    y.bits += (uint32_t)(int32_t)n << 23;
    return y.value;
}

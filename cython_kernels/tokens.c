#include "tokens.h"

#include <math.h>

/* Exact 2^e for -126 <= e <= 127. */
static float power_of_two(int e) {
    uint32_t bits = (uint32_t)(e + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void hl_prepare_float32(const float *x, int64_t k, int is_fp8, hl_word *out, int64_t stride, float *post) {
    float largest = 0;
    int up = 0, down = 0; /* x is multiplied by 2^up, results by 2^down */
    if (is_fp8) {
        for (int64_t i = 0; i < k; i++) {
            float a = fabsf(x[i]);
            largest = a > largest && a <= 3.4028235e38f ? a : largest;
        }
        int exponent = 0; /* largest = f * 2^exponent with f in [0.5, 1) */
        if (largest > 0) frexpf(largest, &exponent);
        up = 119 - exponent < 252 ? 119 - exponent : 252; /* tiny x: both factors must be finite */
        down = 120 - up;
    }
    const float up0 = power_of_two(up / 2), up1 = power_of_two(up - up / 2);
    post[0] = power_of_two(down / 2);
    post[1] = power_of_two(down - down / 2);
    for (int64_t b = 0; b < hl_blocks(k); b++) {
        float block[HL_BLOCK] = {0};
        const int64_t left = k - b * HL_BLOCK;
        for (int64_t i = 0; i < HL_BLOCK && i < left; i++) block[i] = hl_round_bf16(x[b * HL_BLOCK + i]) * up0 * up1;
        memcpy(out + b * stride, block, sizeof block);
    }
}

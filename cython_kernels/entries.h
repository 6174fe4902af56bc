/* A tier's entry points: by the type of the weights. */
static void dot(const hl_matrix *w, int64_t r0, int64_t r1, const hl_inputs *x, int m, const hl_outputs *out,
                const uint8_t *next) {
    (w->scale ? dot_fp8 : dot_bf16)(w, r0, r1, x, m, out, next);
}

static void pack(const hl_matrix *w, int64_t panel, uint8_t *out) {
    (w->scale ? dot_fp8_pack : dot_bf16_pack)(w, panel, out);
}

/* A whole attention layer for tokens that decode, in one call. */
#include <stdlib.h>

#include "attention.h"
#include "forward.h"
#include "glue.h"

#if defined(__x86_64__)

int hl_attention_step(const hl_attention *a, const hl_attention_call *c) {
    const int64_t tokens = c->tokens, h = a->q.k, heads = a->n * a->d, groups = a->g * a->d;
    float *normed = hl_scratch((size_t)(tokens * (h + 2 * heads + 2 * groups)) * sizeof(float));
    if (!normed) return -1;
    float *q = normed + tokens * h, *k = q + tokens * heads, *v = k + tokens * groups, *mixed = v + tokens * groups;
    const hl_matrix *const projections[] = {&a->q, &a->k, &a->v};
    float *const projected[] = {q, k, v};
    int failed = 0;
    hl_rms_norm(c->x, a->input_norm, a->eps, tokens, h, normed);
    failed |= hl_linear_many(a->tier, projections, 3, normed, tokens, projected, c->threads);
    hl_norm_rope(q, a->q_norm, a->eps, c->cosines, c->sines, tokens, a->n, a->d, q);
    hl_norm_rope(k, a->k_norm, a->eps, c->cosines, c->sines, tokens, a->g, a->d, k);
    for (int64_t t = 0; t < tokens; t++) {
        uint16_t *key = c->keys + c->slots[t] * groups, *value = c->values + c->slots[t] * groups;
        for (int64_t i = 0; i < groups; i++) key[i] = hl_bf16_bits(k[t * groups + i]);
        for (int64_t i = 0; i < groups; i++) value[i] = hl_bf16_bits(v[t * groups + i]);
    }
    const hl_attend all = {q, c->keys, c->values, a->n, a->g, a->d, c->contexts, tokens, mixed};
    failed |= hl_attend_all(a->tier, &all, c->threads);
    failed |= hl_linear(a->tier, &a->o, mixed, tokens, c->out, c->threads);
    for (int64_t i = 0; i < tokens * h; i++) c->out[i] += c->x[i];
    free(normed);
    return failed;
}
#endif

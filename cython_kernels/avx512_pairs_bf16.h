/* BF16 weights need no decoding: a step of a tile is 16 rows of one pair of k. Then the tier's two entry points. */
#define NAME dot_bf16
#define ELEMENT 2
#define PIECES 1
#define DECODE(v, piece) ((piece)[0] = (v))
#define FLAG int
#define FLAG_ZERO() 0
#define FLAG_SEE(flag, v) NO_FLAG_SEE(flag, v)
#define FLAG_LANES(flag, nan) NO_FLAG_LANES(flag, nan)
#include "tiles.h"

#include "entries.h"

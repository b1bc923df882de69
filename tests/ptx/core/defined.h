/* Which bytes of a register were written. Kernels carry words of which they use a part, a pair of halves above all.

   `defined` has the lanes where all of a register is initialised, of a 64-bit one in both its units; that is nearly
   always, and then nothing here runs. Where it is not, `bytes` has the lanes where a byte still is. What moves,
   packs, shifts or masks bytes gives each byte of its result what it read for it; every other operation reads all of
   its operands, and one byte missing makes all of the result undefined. */
#ifndef DEFINED_H
#define DEFINED_H
#include "machine.h"

typedef struct { uint32_t byte[4]; } Planes; /* lanes, for each byte of a unit */

static inline uint32_t byte_defined(const Warp *w, int32_t u, int byte) { return w->defined[u] | w->bytes[4 * u + byte]; }
static inline uint32_t bytes_defined(const Warp *w, int32_t u, int first, int count) {
    uint32_t good = ~0u;
    for (int k = first; k < first + count; k++) good &= byte_defined(w, u, k);
    return good;
}
static inline Planes planes_of(const Warp *w, int32_t u) {
    return (Planes){{byte_defined(w, u, 0), byte_defined(w, u, 1), byte_defined(w, u, 2), byte_defined(w, u, 3)}};
}
static inline Planes alike(uint32_t good) { return (Planes){{good, good, good, good}}; }
static inline Planes halves(uint32_t low, uint32_t high) { return (Planes){{low, low, high, high}}; }
static inline uint32_t whole(Planes p) { return p.byte[0] & p.byte[1] & p.byte[2] & p.byte[3]; }
/* Of a register of one unit, or of one of the two of a wide register, which counts as defined if both are. */
static void set_planes(Warp *w, int32_t u, uint32_t mask, Planes p, uint32_t all) {
    set_defined(w, u, mask, all);
    for (int k = 0; k < 4; k++) w->bytes[4 * u + k] = (w->bytes[4 * u + k] & ~mask) | (p.byte[k] & mask);
}
static void set_narrow(Warp *w, int32_t u, uint32_t mask, Planes p) { set_planes(w, u, mask, p, whole(p)); }
static void set_wide(Warp *w, int32_t u, uint32_t mask, Planes low, Planes high) {
    uint32_t all = whole(low) & whole(high);
    set_planes(w, u, mask, low, all); set_planes(w, u + 1, mask, high, all);
}
/* Of the first `size` bytes of a register, those that a store takes. */
static uint32_t taken_defined(const Warp *w, int32_t u, int size) {
    return bytes_defined(w, u, 0, size < 4 ? size : 4) & (size == 8 ? bytes_defined(w, u + 1, 0, 4) : ~0u);
}

/* --- operations that carry bytes --- */

static Planes bitwise(const Warp *w, const Ins *i, int unit) {
    Planes x = planes_of(w, i->a + unit), y = planes_of(w, i->b + unit), p;
    const uint32_t *A = w->r + (i->a + unit) * LANES, *B = w->r + (i->b + unit) * LANES;
    for (int k = 0; k < 4; k++) p.byte[k] = x.byte[k] & y.byte[k];
    /* Zeros of a mask decide, whatever they mask. */
    if (i->op == OP_AND_B32 || i->op == OP_AND_B64) for (int k = 0; k < 4; k++) EACH_LANE {
        uint32_t zero = (x.byte[k] >> l & !(A[l] >> 8 * k & 255)) | (y.byte[k] >> l & !(B[l] >> 8 * k & 255));
        p.byte[k] |= zero << l;
    }
    return p;
}
static Planes permuted(const Warp *w, const Ins *i) {
    Planes p = {{0}};
    for (int k = 0; k < 4; k++) EACH_LANE {
        uint32_t s = w->r[i->c * LANES + l] >> 4 * k & 7;
        p.byte[k] |= byte_defined(w, s < 4 ? i->a : i->b, s & 3) & w->defined[i->c] & 1u << l;
    }
    return p;
}
static Planes shifted(const Warp *w, const Ins *i) {
    Planes p = {{0}};
    for (int k = 0; k < 4; k++) EACH_LANE {
        uint32_t amount = w->r[i->b * LANES + l], good = w->defined[i->b];
        int by = amount > 32 ? 32 : (int)amount, low = 8 * k + (i->op == OP_SHL_B32 ? -by : by);
        for (int bit = low; bit < low + 14; bit += 7) { /* the byte's first and last bit: of two bytes, or of one */
            if (bit > 31 && i->op == OP_SHR_S32) good &= byte_defined(w, i->a, 3);
            else if (bit >= 0 && bit <= 31) good &= byte_defined(w, i->a, bit >> 3);
        }
        p.byte[k] |= good & 1u << l;
    }
    return p;
}
static uint32_t three_defined(const Warp *w, const Ins *i, int first, int count) {
    return bytes_defined(w, i->a, first, count) & bytes_defined(w, i->b, first, count) & bytes_defined(w, i->c, first, count);
}
static Planes narrow_result(const Warp *w, const Ins *i) {
    switch (i->op) {
    case OP_AND_B32: case OP_OR_B32: case OP_XOR_B32: case OP_NOT_B32: case OP_MOV_B32: return bitwise(w, i, 0);
    case OP_PRMT_B32: return permuted(w, i);
    case OP_SHL_B32: case OP_SHR_U32: case OP_SHR_S32: return shifted(w, i);
    case OP_CVT_U32_U8: case OP_CVT_S32_S8: return alike(byte_defined(w, i->a, 0));
    case OP_SHL_B16: case OP_SHR_U16: return alike(bytes_defined(w, i->a, 0, 2) & w->defined[i->b]);
    case OP_AND_B16: case OP_OR_B16: case OP_XOR_B16: case OP_MOV_B16: case OP_ADD_S16:
    case OP_CVT_U16_U32: case OP_CVT_U32_U16: case OP_CVT_S32_S16: case OP_CVT_F32_BF16: case OP_CVT_F32_F16:
        return alike(three_defined(w, i, 0, 2));
    case OP_FMA_RN_BF16X2: case OP_MUL_RN_BF16X2: case OP_ADD_RN_BF16X2: case OP_FMA_RN_F16X2: case OP_MUL_RN_F16X2: case OP_ADD_RN_F16X2:
        return halves(three_defined(w, i, 0, 2), three_defined(w, i, 2, 2));
    case OP_CVT_RN_BF16X2_F32: case OP_CVT_RN_F16X2_F32: return halves(w->defined[i->b], w->defined[i->a]);
    default: return alike(w->defined[i->a] & w->defined[i->b] & w->defined[i->c]);
    }
}
/* Definedness of an ALU operation whose operands are not all defined; before its result is written. */
static __attribute__((noinline, cold)) void partly_defined(Machine *m, const Ins *i) {
    Warp *w = m->w;
    switch (i->op) {
    case OP_PACK_B64: set_wide(w, i->d, m->mask, planes_of(w, i->a), planes_of(w, i->b)); return;
    case OP_AND_B64: case OP_OR_B64: case OP_XOR_B64: case OP_NOT_B64: case OP_MOV_B64:
        set_wide(w, i->d, m->mask, bitwise(w, i, 0), bitwise(w, i, 1)); return;
    default: break;
    }
    Planes p = narrow_result(w, i);
    if (i->wide) set_wide(w, i->d, m->mask, p, p); else set_narrow(w, i->d, m->mask, p);
}
#endif

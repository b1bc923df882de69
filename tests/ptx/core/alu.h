/* Arithmetic, comparisons, predicates, exchange between lanes. All lanes are computed; those at work are kept. */
#include "defined.h"
#include "numbers.h"

static inline uint32_t field(uint32_t x, uint32_t at, uint32_t length, int is_signed) {
    at &= 255; length &= 255;
    if (!length) return 0;
    uint64_t wide = is_signed ? (uint64_t)(int64_t)(int32_t)x : x;
    wide = at > 31 ? (is_signed && (int32_t)x < 0 ? ~0ull : 0) : is_signed ? (uint64_t)((int64_t)wide >> at) : wide >> at;
    if (length > 31) return (uint32_t)wide;
    uint32_t cut = (uint32_t)wide & ((1u << length) - 1);
    return is_signed && cut >> (length - 1) ? cut | ~((1u << length) - 1) : cut;
}
static inline uint32_t permute(uint32_t x, uint32_t y, uint32_t selector) {
    uint64_t both = x | (uint64_t)y << 32; uint32_t result = 0;
    for (int k = 0; k < 4; k++) {
        uint32_t s = selector >> 4 * k & 15, byte = (uint32_t)(both >> 8 * (s & 7)) & 255;
        if (s & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * k;
    }
    return result;
}
static inline int64_t s64(uint64_t x) { return (int64_t)x; }
static inline int32_t s32(uint32_t x) { return (int32_t)x; }

#define U(name, e) case OP_##name: EACH_LANE { uint32_t x = A[l], y = B[l], z = C[l]; (void)x, (void)y, (void)z; o[l] = (uint32_t)(e); } break;
#define F(name, e) case OP_##name: EACH_LANE { float x = as_float(A[l]), y = as_float(B[l]), z = as_float(C[l]); \
    (void)x, (void)y, (void)z; o[l] = as_bits(e); } break;
#define T(name, e) case OP_##name: EACH_LANE { float x = as_float(A[l]); o[l] = (uint32_t)(e); } break;
#define D(name, e) case OP_##name: EACH_LANE { uint64_t x = get64(w, i->a, l), y = get64(w, i->b, l), z = get64(w, i->c, l); \
    (void)x, (void)y, (void)z; uint64_t v = (uint64_t)(e); o[l] = (uint32_t)v; o[l + LANES] = (uint32_t)(v >> 32); } break;
#define W(name, e) case OP_##name: EACH_LANE { uint32_t x = A[l], y = B[l]; uint64_t z = get64(w, i->c, l); \
    (void)x, (void)y, (void)z; uint64_t v = (uint64_t)(e); o[l] = (uint32_t)v; o[l + LANES] = (uint32_t)(v >> 32); } break;
#define CUT(x) ((x) & 0xffff)

static void arithmetic(Machine *m, const Ins *i) {
    Warp *w = m->w; uint32_t o[2 * LANES];
    const uint32_t *A = w->r + i->a * LANES, *B = w->r + i->b * LANES, *C = w->r + i->c * LANES;
    uint32_t good = w->defined[i->a] & w->defined[i->b] & w->defined[i->c];
    switch (i->op) {
    U(COPYSIGN_F32, (x & 0x80000000u) | (y & 0x7fffffffu))
    U(ADD_S32, x + y) U(SUB_S32, x - y) U(MUL_LO_S32, x * y) U(MAD_LO_S32, x * y + z) U(NEG_S32, -x) U(ABS_S32, s32(x) < 0 ? -x : x)
    U(MUL_HI_U32, (uint64_t)x * y >> 32) U(MUL_HI_S32, (int64_t)s32(x) * s32(y) >> 32)
    U(MIN_S32, s32(x) < s32(y) ? x : y) U(MAX_S32, s32(x) > s32(y) ? x : y) U(MIN_U32, x < y ? x : y) U(MAX_U32, x > y ? x : y)
    U(MIN_RELU_S32, s32(x) < 0 || s32(y) < 0 ? 0 : x < y ? x : y)
    U(MAX_RELU_S32, s32(x) < 0 && s32(y) < 0 ? 0 : s32(x) > s32(y) ? x : y)
    U(AND_B32, x & y) U(OR_B32, x | y) U(XOR_B32, x ^ y) U(NOT_B32, ~x) U(MOV_B32, x)
    U(SHL_B32, y > 31 ? 0 : x << y) U(SHR_U32, y > 31 ? 0 : x >> y) U(SHR_S32, s32(x) >> (y > 31 ? 31 : y))
    U(BFE_U32, field(x, y, z, 0)) U(BFE_S32, field(x, y, z, 1)) U(PRMT_B32, permute(x, y, z))
    U(POPC_B32, __builtin_popcount(x)) U(CLZ_B32, x ? __builtin_clz(x) : 32)
    U(AND_B16, x & y) U(OR_B16, x | y) U(XOR_B16, x ^ y) U(MOV_B16, CUT(x)) U(ADD_S16, CUT(x + y))
    U(SHL_B16, y > 15 ? 0 : CUT(x << y)) U(SHR_U16, y > 15 ? 0 : CUT(x) >> y)
    U(CVT_U16_U32, CUT(x)) U(CVT_U32_U16, CUT(x)) U(CVT_S32_S16, (int32_t)(int16_t)x) U(CVT_U32_U8, x & 255) U(CVT_S32_S8, (int32_t)(int8_t)x)
    F(CVT_RN_F32_S32, (float)s32(as_bits(x))) F(CVT_RN_F32_U32, (float)as_bits(x)) T(CVT_RZI_S32_F32, truncate(x))
    case OP_CVT_RN_F32_U64: EACH_LANE o[l] = as_bits((float)get64(w, i->a, l)); break;
    case OP_CVT_RN_F32_S64: EACH_LANE o[l] = as_bits((float)s64(get64(w, i->a, l))); break;
    case OP_POPC_B64: EACH_LANE o[l] = (uint32_t)__builtin_popcountll(get64(w, i->a, l)); break;
    F(ADD_RN_F32, x + y) F(SUB_RN_F32, x - y) F(MUL_RN_F32, x * y) F(DIV_RN_F32, x / y) F(DIV_FULL_F32, x / y) F(NEG_F32, -x) F(ABS_F32, fabsf(x))
    F(FMA_RN_F32, fmaf(x, y, z)) F(FMA_RN_FTZ_F32, flush(fmaf(flush(x), flush(y), flush(z)))) F(SQRT_RN_F32, sqrtf(x))
    F(MIN_F32, minimum(x, y)) F(MAX_F32, maximum(x, y)) F(RSQRT_APPROX_FTZ_F32, flush((float)(1 / sqrt((double)flush(x)))))
    F(EX2_APPROX_F32, exp2f(x)) F(EX2_APPROX_FTZ_F32, flush(exp2f(flush(x)))) F(LG2_APPROX_F32, log2f(x))
    T(CVT_RN_BF16_F32, to_bf16(x)) T(CVT_RN_F16_F32, to_half(x)) U(CVT_F32_BF16, as_bits(widen(x, 1))) U(CVT_F32_F16, as_bits(widen(x, 0)))
    U(CVT_RN_BF16X2_F32, to_bf16(as_float(x)) << 16 | to_bf16(as_float(y))) U(CVT_RN_F16X2_F32, to_half(as_float(x)) << 16 | to_half(as_float(y)))
    U(FMA_RN_BF16, fused(x, y, z, 1)) U(MUL_RN_BF16, fused(x, y, 0x8000, 1)) U(ADD_RN_BF16, fused(x, 0x3f80, y, 1))
    U(FMA_RN_BF16X2, fused_pair(x, y, z, 1)) U(MUL_RN_BF16X2, fused_pair(x, y, 0x80008000, 1)) U(ADD_RN_BF16X2, fused_pair(x, 0x3f803f80, y, 1))
    U(FMA_RN_F16, fused(x, y, z, 0)) U(MUL_RN_F16, fused(x, y, 0x8000, 0)) U(ADD_RN_F16, fused(x, 0x3c00, y, 0)) U(SUB_RN_F16, fused(y, 0xbc00, x, 0))
    U(FMA_RN_F16X2, fused_pair(x, y, z, 0)) U(MUL_RN_F16X2, fused_pair(x, y, 0x80008000, 0)) U(ADD_RN_F16X2, fused_pair(x, 0x3c003c00, y, 0))
    U(SUB_RN_BF16, fused(y, 0xbf80, x, 1))
    D(ADD_S64, x + y) D(SUB_S64, x - y) D(MUL_LO_S64, x * y) D(MAD_LO_S64, x * y + z) D(NEG_S64, -x)
    D(MIN_S64, s64(x) < s64(y) ? x : y) D(MAX_S64, s64(x) > s64(y) ? x : y) D(MIN_U64, x < y ? x : y) D(MAX_U64, x > y ? x : y)
    D(AND_B64, x & y) D(OR_B64, x | y) D(XOR_B64, x ^ y) D(NOT_B64, ~x) D(MOV_B64, x)
    D(SHL_B64, (uint32_t)y > 63 ? 0 : x << (uint32_t)y) D(SHR_U64, (uint32_t)y > 63 ? 0 : x >> (uint32_t)y)
    D(SHR_S64, s64(x) >> ((uint32_t)y > 63 ? 63 : (uint32_t)y))
    W(MUL_WIDE_S32, (int64_t)s32(x) * s32(y)) W(MUL_WIDE_U32, (uint64_t)x * y) W(MAD_WIDE_S32, (uint64_t)((int64_t)s32(x) * s32(y)) + z)
    W(MAD_WIDE_U32, (uint64_t)x * y + z) W(CVT_S64_S32, (int64_t)s32(x)) W(CVT_U64_U32, x) W(CVT_U64_U16, CUT(x)) W(PACK_B64, x | (uint64_t)y << 32)
    default: fault(m, FAULT_UNKNOWN, 0, 0, 0);
    }
    int units = i->wide ? 2 : 1;
    uint32_t missing = m->mask & ~good;
    if (missing) partly_defined(m, i); /* before the result is written, where it may be a source */
    for (int k = 0; k < units; k++) {
        uint32_t *d = w->r + (i->d + k) * LANES;
        if (m->mask == ~0u) memcpy(d, o + k * LANES, 4 * LANES);
        else EACH_LANE if (m->mask >> l & 1) d[l] = o[l + k * LANES];
        if (!missing) set_defined(w, i->d + k, m->mask, ~0u);
    }
}

#define COMPARE(type, read) { type x[LANES], y[LANES]; EACH_LANE { x[l] = (type)read(i->a); y[l] = (type)read(i->b); } \
    switch (i->vec) { \
    case CMP_EQ: EACH_LANE p |= (uint32_t)(x[l] == y[l]) << l; break; case CMP_NE: EACH_LANE p |= (uint32_t)(x[l] != y[l]) << l; break; \
    case CMP_LT: EACH_LANE p |= (uint32_t)(x[l] < y[l]) << l; break; case CMP_LE: EACH_LANE p |= (uint32_t)(x[l] <= y[l]) << l; break; \
    case CMP_GT: EACH_LANE p |= (uint32_t)(x[l] > y[l]) << l; break; default: EACH_LANE p |= (uint32_t)(x[l] >= y[l]) << l; } break; }
#define WORD(u) w->r[(u) * LANES + l]
#define WIDE(u) get64(w, u, l)

static uint32_t compare_floats(const Warp *w, const Ins *i) {
    uint32_t p = 0;
    EACH_LANE {
        float x = as_float(WORD(i->a)), y = as_float(WORD(i->b)); int unordered = x != x || y != y, r;
        switch (i->vec) {
        case CMP_EQ: r = x == y; break; case CMP_NE: r = !unordered && x != y; break; case CMP_LT: r = x < y; break;
        case CMP_LE: r = x <= y; break; case CMP_GT: r = x > y; break; case CMP_GE: r = x >= y; break;
        case CMP_EQU: r = unordered || x == y; break; case CMP_NEU: r = x != y; break; case CMP_LTU: r = !(x >= y); break;
        case CMP_LEU: r = !(x > y); break; case CMP_GTU: r = !(x <= y); break; case CMP_GEU: r = !(x < y); break;
        case CMP_NUM: r = !unordered; break; default: r = unordered;
        }
        p |= (uint32_t)r << l;
    }
    return p;
}
static void set_pred(Machine *m, int32_t d, uint32_t value, uint32_t good) {
    m->w->pred[d] = (m->w->pred[d] & ~m->mask) | (value & m->mask);
    m->w->pdefined[d] = (m->w->pdefined[d] & ~m->mask) | (good & m->mask);
}
static void compare(Machine *m, const Ins *i) {
    Warp *w = m->w; uint32_t p = 0;
    switch (i->op) {
    case OP_SETP_S32: COMPARE(int32_t, WORD) case OP_SETP_U32: COMPARE(uint32_t, WORD) case OP_SETP_U16: COMPARE(uint16_t, WORD)
    case OP_SETP_S16: COMPARE(int16_t, WORD) case OP_SETP_S64: COMPARE(int64_t, WIDE) case OP_SETP_U64: COMPARE(uint64_t, WIDE)
    default: p = compare_floats(w, i);
    }
    int half = i->op == OP_SETP_U16 || i->op == OP_SETP_S16;
    set_pred(m, i->d, p, half ? bytes_defined(w, i->a, 0, 2) & bytes_defined(w, i->b, 0, 2) : w->defined[i->a] & w->defined[i->b]);
}
static void logic(Machine *m, const Ins *i) {
    Warp *w = m->w; uint32_t x = w->pred[i->a], y = w->pred[i->b], good = w->pdefined[i->a] & w->pdefined[i->b];
    switch (i->op) { /* a false operand decides `and`, a true one `or`, whatever the other is */
    case OP_AND_PRED: good |= (w->pdefined[i->a] & ~x) | (w->pdefined[i->b] & ~y); x &= y; break;
    case OP_OR_PRED: good |= (w->pdefined[i->a] & x) | (w->pdefined[i->b] & y); x |= y; break;
    case OP_XOR_PRED: x ^= y; break;
    case OP_NOT_PRED: x = ~x; good = w->pdefined[i->a]; break;
    default: good = w->pdefined[i->a]; /* mov */
    }
    set_pred(m, i->d, x, good);
}
static void choose(Machine *m, const Ins *i) {
    Warp *w = m->w; uint32_t p = w->pred[i->c];
    uint32_t good = w->pdefined[i->c] & ((p & w->defined[i->a]) | (~p & w->defined[i->b]));
    uint32_t missing = m->mask & ~good; Planes kept[2];
    if (missing) for (int k = 0; k <= i->wide; k++) for (int j = 0; j < 4; j++)
        kept[k].byte[j] = w->pdefined[i->c] & ((p & byte_defined(w, i->a + k, j)) | (~p & byte_defined(w, i->b + k, j)));
    for (int k = 0; k <= i->wide; k++) {
        EACH_LANE if (m->mask >> l & 1) WORD(i->d + k) = p >> l & 1 ? WORD(i->a + k) : WORD(i->b + k);
        if (missing) set_planes(w, i->d + k, m->mask, kept[k], good);
        else set_defined(w, i->d + k, m->mask, ~0u);
    }
}
/* Lanes meet here: all that the member mask names, and no others. */
static void members(Machine *m, int32_t unit) {
    if (m->w->r[unit * LANES + first_lane(m->mask)] != m->mask) fault(m, FAULT_LANES, first_lane(m->mask), 0, 0);
}
static void shuffle(Machine *m, const Ins *i) {
    Warp *w = m->w; uint32_t o[LANES], good = 0; int from[LANES];
    members(m, m->l->lists[i->list]);
    need(m, w->defined[i->b] & w->defined[i->c]);
    EACH_LANE {
        int b = (int)(WORD(i->b) & 31), c = (int)WORD(i->c), segment = c >> 8 & 31;
        int last = (l & segment) | (c & 31 & ~segment), at;
        if (i->op == OP_SHFL_UP) { at = l - b; if (at < last) at = l; }
        else {
            at = i->op == OP_SHFL_BFLY ? l ^ b : i->op == OP_SHFL_DOWN ? l + b : (l & segment) | (b & ~segment);
            if (at > last) at = l;
        }
        o[l] = w->r[i->a * LANES + at]; from[l] = at;
        good |= (w->defined[i->a] >> at & m->mask >> at & 1) << l;
    }
    EACH_LANE if (m->mask >> l & 1) WORD(i->d) = o[l];
    if (!(m->mask & ~good)) { set_defined(w, i->d, m->mask, ~0u); return; }
    Planes given = planes_of(w, i->a), p = {{0}};
    for (int k = 0; k < 4; k++) EACH_LANE p.byte[k] |= (given.byte[k] >> from[l] & m->mask >> from[l] & 1) << l;
    set_narrow(w, i->d, m->mask, p);
}
static void reduce(Machine *m, const Ins *i) {
    Warp *w = m->w; int first = first_lane(m->mask); uint32_t v = w->r[i->a * LANES + first];
    members(m, i->b);
    EACH_LANE if (m->mask >> l & 1 && l != first) {
        uint32_t x = WORD(i->a);
        switch (i->op) {
        case OP_REDUX_ADD: v += x; break;
        case OP_REDUX_MIN_S: v = s32(x) < s32(v) ? x : v; break; case OP_REDUX_MAX_S: v = s32(x) > s32(v) ? x : v; break;
        case OP_REDUX_MIN_U: v = x < v ? x : v; break; case OP_REDUX_MAX_U: v = x > v ? x : v; break;
        case OP_REDUX_AND: v &= x; break; case OP_REDUX_OR: v |= x; break; default: v ^= x;
        }
    }
    EACH_LANE if (m->mask >> l & 1) WORD(i->d) = v;
    set_defined(w, i->d, m->mask, (w->defined[i->a] & m->mask) == m->mask ? ~0u : 0);
}

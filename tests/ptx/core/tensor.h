/* Tensor cores: products of 16 terms, exact, added up in double with ascending k and rounded to float once. */
#include "defined.h"

typedef struct { float a[16][16], b[16][256]; uint32_t bad_rows; uint8_t bad_columns[256]; } Tiles;

/* Eight columns at a time, which any compiler turns into what its processor has. */
typedef double Eight __attribute__((vector_size(64)));
typedef float EightNarrow __attribute__((vector_size(32)));

static void sum_products(const Tiles *t, int n, double *acc) { /* acc [16][n] starts as C and becomes D */
    for (int j = 0; j < n; j += 8) {
        Eight b[16];
        for (int k = 0; k < 16; k++) {
            EightNarrow narrow; memcpy(&narrow, t->b[k] + j, sizeof narrow);
            b[k] = __builtin_convertvector(narrow, Eight);
        }
        for (int row = 0; row < 16; row++) {
            Eight s = {0}, c; double *to = acc + row * n + j;
            for (int k = 0; k < 16; k++) s += (double)t->a[row][k] * b[k];
            memcpy(&c, to, sizeof c);
            c += s;
            memcpy(to, &c, sizeof c);
        }
    }
}
static void gather_a(Machine *m, const int32_t *units, int bf16, Tiles *t) {
    for (int k = 0; k < 4; k++) EACH_LANE {
        int row = l / 4 + 8 * (k & 1), column = 2 * (l % 4) + 8 * (k >> 1);
        uint32_t x = m->w->r[units[k] * LANES + l];
        t->a[row][column] = widen(x, bf16); t->a[row][column + 1] = widen(x >> 16, bf16);
        if (!(m->w->defined[units[k]] >> l & 1)) t->bad_rows |= 1u << row;
    }
}
/* C and D of m16 by n: register i of a lane is row g + 8 (i/2 % 2), column 8 (i/4) + t + i % 2. */
static void read_c(Machine *m, const int32_t *units, int n, double *acc, int zero) {
    for (int k = 0; k < n / 2; k++) EACH_LANE
        acc[(l / 4 + 8 * (k >> 1 & 1)) * n + 8 * (k >> 2) + 2 * (l % 4) + (k & 1)] = zero ? 0 : as_float(m->w->r[units[k] * LANES + l]);
}
static void write_d(Machine *m, const int32_t *units, const int32_t *c, int n, const double *acc, const Tiles *t, uint32_t good_c) {
    for (int k = 0; k < n / 2; k++) {
        uint32_t good = c ? m->w->defined[c[k]] : good_c;
        EACH_LANE {
            int row = l / 4 + 8 * (k >> 1 & 1), column = 8 * (k >> 2) + 2 * (l % 4) + (k & 1);
            m->w->r[units[k] * LANES + l] = as_bits((float)acc[row * n + column]);
            if (t->bad_rows >> row & 1 || t->bad_columns[column]) good &= ~(1u << l);
        }
        set_defined(m->w, units[k], ~0u, good);
    }
}
static void whole_warp(Machine *m) { if (m->mask != ~0u) fault(m, FAULT_LANES, first_lane(m->mask), 0, 0); }

static void mma(Machine *m, const Ins *i) {
    static Tiles t; double acc[16 * 8];
    const int32_t *u = m->l->lists + i->list; int bf16 = i->flags & FLAG_BF16;
    whole_warp(m);
    t.bad_rows = 0; memset(t.bad_columns, 0, 8);
    gather_a(m, u + 4, bf16, &t);
    for (int k = 0; k < 2; k++) EACH_LANE {
        uint32_t x = m->w->r[u[8 + k] * LANES + l]; int row = 2 * (l % 4) + 8 * k;
        t.b[row][l / 4] = widen(x, bf16); t.b[row + 1][l / 4] = widen(x >> 16, bf16);
        if (!(m->w->defined[u[8 + k]] >> l & 1)) t.bad_columns[l / 4] = 1;
    }
    read_c(m, u + 10, 8, acc, 0);
    sum_products(&t, 8, acc);
    write_d(m, u, u + 10, 8, acc, &t, 0);
}

/* Lane 8j + q addresses row q of matrix j; lane l holds elements 2 (l % 4) and the next of row l / 4. */
static void matrix_rows(Machine *m, const Ins *i, uint32_t *at) {
    uint64_t address[LANES]; uint32_t used = i->vec == 4 ? ~0u : (1u << 8 * i->vec) - 1;
    whole_warp(m);
    m->mask = used; addresses(m, i, address);
    for (int l = 0; l < 8 * i->vec; l++) at[l] = shared_at(m, address[l], 16, l);
    count_conflicts(&m->l->conflicts, address, used, 16);
    m->mask = ~0u;
}
/* Where a lane's two halves of matrix j lie. */
static inline void places_of(const Ins *i, const uint32_t *at, int j, int l, uint32_t *low, uint32_t *high) {
    int pair = 2 * (l % 4), row = l / 4;
    if (i->flags & FLAG_TRANS) { *low = at[8 * j + pair] + 2 * row; *high = at[8 * j + pair + 1] + 2 * row; }
    else { *low = at[8 * j + row] + 2 * pair; *high = *low + 2; }
}
static void ldmatrix(Machine *m, const Ins *i) {
    uint32_t at[LANES], low, high, good = 1; const Block *b = m->block;
    matrix_rows(m, i, at);
    for (int l = 0; l < 8 * i->vec; l++) good &= shared_read(m, at[l], 16, l);
    for (int j = 0; j < i->vec; j++) {
        int32_t d = m->l->lists[i->list + j];
        EACH_LANE {
            uint16_t lo, hi;
            places_of(i, at, j, l, &low, &high);
            memcpy(&lo, b->shared + low, 2); memcpy(&hi, b->shared + high, 2);
            m->w->r[d * LANES + l] = lo | (uint32_t)hi << 16;
        }
        if (good) { set_defined(m->w, d, ~0u, ~0u); continue; }
        Planes p = {{0}};
        EACH_LANE {
            places_of(i, at, j, l, &low, &high);
            for (int k = 0; k < 4; k++) p.byte[k] |= (uint32_t)(b->state[(k < 2 ? low : high) + k % 2] == INITIALISED) << l;
        }
        set_narrow(m->w, d, ~0u, p);
    }
}
static void stmatrix(Machine *m, const Ins *i) {
    uint32_t at[LANES];
    matrix_rows(m, i, at);
    for (int j = 0; j < i->vec; j++) {
        int32_t s = m->l->lists[i->list + j];
        for (int row = 0; row < 8; row++) {
            uint16_t data[8]; uint8_t good[8]; uint32_t all = 1, to = at[8 * j + row];
            for (int k = 0; k < 8; k++) {
                int lane = i->flags & FLAG_TRANS ? 4 * k + row / 2 : 4 * row + k / 2, high = i->flags & FLAG_TRANS ? row & 1 : k & 1;
                data[k] = (uint16_t)(m->w->r[s * LANES + lane] >> 16 * high);
                good[k] = bytes_defined(m->w, s, 2 * high, 2) >> lane & 1;
                all &= good[k];
            }
            shared_write(m, to, (uint8_t *)data, 16, 8 * j + row, all);
            for (int k = 0; k < 8 && !all; k++) memset(m->block->state + to + 2 * k, good[k], 2);
        }
    }
}

/* --- wgmma: operands in shared memory behind descriptors, results in flight until a wait --- */

typedef struct { uint32_t start, leading, stride, pitch, swizzle; } Matrix; /* pitch: bytes of a row of an atom of 8 */

static Matrix described(Machine *m, uint64_t d) {
    uint32_t kind = (uint32_t)(d >> 62); /* 1, 2, 3: swizzles of 128, 64 and 32 bytes */
    if (!kind || d >> 49 & 7) fault(m, FAULT_DESCRIPTOR, 0, d, 0);
    return (Matrix){(uint32_t)(d & 0x3fff) << 4, (uint32_t)(d >> 16 & 0x3fff) << 4, (uint32_t)(d >> 32 & 0x3fff) << 4,
                    256u >> kind, 7u >> (kind - 1)};
}
static uint32_t element(Machine *m, const Matrix *x, uint32_t row, uint32_t k, int k_major, int bf16, uint32_t epoch, float *to) {
    uint32_t across = x->pitch / 2;
    uint64_t at = k_major ? x->start + row / 8 * x->stride + row % 8 * x->pitch + 2 * k
                          : x->start + k / 8 * x->stride + k % 8 * x->pitch + row / across * x->leading + 2 * (row % across);
    at ^= (at >> 7 & x->swizzle) << 4; /* of the absolute address */
    uint32_t s = shared_at(m, at, 2, 0), good = shared_read(m, s, 2, 0);
    if (m->l->detect) {
        const Byte *b = m->block->shadow + s;
        if (b->wepoch > epoch) race(m, FAULT_SHARED_RACE, 0, at, b->wpc, b->writer, b->wlane);
    }
    uint16_t h; memcpy(&h, m->block->shared + s, 2);
    *to = widen(h, bf16);
    return good;
}
static void multiply(Machine *m, const Product *p) {
    static Tiles t; static double acc[16 * 256];
    const Ins *i = p->ins; const int32_t *u = m->l->lists + i->list; int n = i->vec, bf16 = i->flags & FLAG_BF16, pc = m->pc;
    Matrix b = described(m, p->b);
    m->pc = p->pc; t.bad_rows = 0; memset(t.bad_columns, 0, (size_t)n);
    if (i->flags & FLAG_A_REGS) gather_a(m, u + n / 2, bf16, &t);
    else {
        Matrix a = described(m, p->a);
        for (int row = 0; row < 16; row++) for (int k = 0; k < 16; k++)
            if (!element(m, &a, (uint32_t)(16 * (m->wi % 4) + row), (uint32_t)k, 1, bf16, p->epoch, &t.a[row][k])) t.bad_rows |= 1u << row;
    }
    for (int k = 0; k < 16; k++) for (int j = 0; j < n; j++)
        if (!element(m, &b, (uint32_t)j, (uint32_t)k, !(i->flags & FLAG_TRANS), bf16, p->epoch, &t.b[k][j])) t.bad_columns[j] = 1;
    read_c(m, u, n, acc, !p->scale);
    sum_products(&t, n, acc);
    write_d(m, u, NULL, n, acc, &t, p->undefined ? 0 : ~0u);
    m->pc = pc;
}
static void wgmma(Machine *m, const Ins *i) {
    Warp *w = m->w; const int32_t *u = m->l->lists + i->list; int chained = 0, undefined = 0, scale = (int)i->imm;
    whole_warp(m);
    if (i->c >= 0) { need(m, w->pdefined[i->c]); scale = w->pred[i->c] & 1; }
    if (!(i->flags & FLAG_A_REGS)) need(m, w->defined[i->a]);
    need(m, w->defined[i->b]);
    for (int k = 0; k < w->nproducts; k++) chained |= m->l->lists[w->products[k].ins->list] == u[0];
    for (int k = 0; k < i->vec / 2 && scale && !chained; k++) undefined |= w->defined[u[k]] != ~0u;
    Product p = {i, i->flags & FLAG_A_REGS ? 0 : get64(w, i->a, 0), get64(w, i->b, 0), w->pgroup, scale,
                 undefined, m->pc, m->block->epoch};
    if (m->l->products == 0 || (m->l->products == 2 && !w->nproducts && dice(m) % 2)) { multiply(m, &p); return; }
    for (int k = 0; k < i->vec / 2; k++) set_defined(w, u[k], ~0u, 0); /* nobody may use them before the wait */
    if (w->nproducts == w->proom) w->products = grow(w->products, &w->proom, sizeof(Product));
    w->products[w->nproducts++] = p;
}
static void wait_products(Machine *m, int32_t left) {
    Warp *w = m->w; int done = 0;
    while (done < w->nproducts && w->products[done].group < w->pgroup - left) multiply(m, w->products + done++);
    w->nproducts -= done;
    memmove(w->products, w->products + done, sizeof(Product) * (size_t)w->nproducts);
    for (int k = 0; k < w->nproducts; k++) /* a later product holds them still */
        for (int j = 0; j < w->products[k].ins->vec / 2; j++) set_defined(w, m->l->lists[w->products[k].ins->list + j], ~0u, 0);
}

/* Types of the PTX machine: instructions as Python encodes them, warps, blocks, launches, faults. */
#ifndef MACHINE_H
#define MACHINE_H
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ops.h" /* generated from isa.py: enum of operations and faults */

enum { LANES = 32, FULL = -1, MAX_WARPS = 16, SHARED_BASE = 1024, WORDS_PAGE = 1024 };
#define EACH_LANE for (int l = 0; l < LANES; l++)

/* Registers are units of 32 lanes x 32 bits; a 64-bit register is two units, low words first, so that an
   instruction narrower than its register reads the low half. Immediates are units too, filled once. */
typedef struct {
    uint16_t op;
    uint8_t size, vec;    /* bytes of an element, elements of a memory access */
    int32_t guard;        /* 0: none; n: predicate n - 1; -n: its negation */
    int32_t d, a, b, c;   /* units or predicates; a is the address of a memory access */
    int32_t list;         /* first of its further operands in `lists` */
    uint16_t flags, wide; /* see FLAG_*; wide: the destination has two units */
    int64_t imm;          /* offset of an address, target of a branch, number of a wait */
} Ins;
enum { FLAG_CACHE_L2 = 1, FLAG_ACQUIRE = 2, FLAG_RELEASE = 4, FLAG_TRANS = 8, FLAG_SIGNED = 16, FLAG_BF16 = 32,
       FLAG_FTZ = 64, FLAG_SHARED = 128, FLAG_A_REGS = 256 };

typedef struct { uint64_t start, end; int32_t region; int32_t pad; } Buffer;

typedef struct {      /* one launch, filled by Python */
    const Ins *code; const int32_t *lists; const uint32_t *constants; const uint8_t *params;
    const Buffer *buffers; const uint64_t *regions; /* start and end of merged ranges that share a shadow */
    int32_t ncode, nunits, npreds, nconstants, nbuffers, nregions, warps, shared;
    int32_t grid[3];
    uint32_t seed;
    int32_t copies, products, late_stores, detect, resident, quantum; /* 0 at once, 1 late, 2 by seed */
    int64_t budget;
    /* out */
    int32_t fault, pc, other_pc, warp, other_warp, lane, other_lane, block[3], other_block[3];
    uint64_t address; int64_t size;
    uint64_t instructions, thread_instructions, barriers, load_sectors, store_sectors, conflicts;
    uint64_t loaded[17], stored[17]; /* bytes by width of the access */
    uint64_t *traffic;               /* [buffers][2]: bytes loaded from each and stored to it */
} Launch;

typedef struct { uint32_t wclock, writer, rclock[2], reader[2]; uint16_t wpc, rpc[2]; uint8_t wmask, wlane, rlane[2]; } Word;
typedef struct { uint32_t wepoch, repoch; uint16_t wpc, rpc, readers; uint8_t writer, wlane, rlane; } Byte;
enum { INITIALISED = 1, FLYING = 2 }; /* state of a byte of shared memory; FLYING: a copy to it is under way */

typedef struct { uint64_t source; uint32_t target; uint8_t size, read, lane, done; int32_t group, pc; } Copy;
typedef struct { const Ins *ins; uint64_t a, b; int32_t group, scale, undefined, pc; uint32_t epoch; } Product;
typedef struct { uint64_t address; uint8_t data[16]; uint8_t size; uint8_t warp; uint32_t clock; } Store;
typedef struct { uint64_t line; uint32_t mask; uint8_t data[32]; } Line;

typedef struct {
    uint32_t *r, *defined, *pred, *pdefined;
    uint32_t *bytes; /* [units][4]: lanes where a byte is initialised though its register is not; see defined.h */
    int32_t pc, next_pc; uint32_t mask, alive; int32_t lanepc[LANES];
    uint8_t waiting, done;
    Copy *copies; int32_t ncopies, room, group, oldest; /* groups committed; all below `oldest` are complete */
    Product *products; int32_t nproducts, proom, pgroup;
    uint32_t clock[MAX_WARPS]; /* what it knows of its own block's warps */
    uint32_t *foreign;         /* and of others, once it acquired something */
} Warp;

typedef struct {
    Warp warps[MAX_WARPS];
    uint8_t *shared, *state; Byte *shadow; /* a shadow only where races are looked for */
    int32_t id[3], linear, live, finished; uint32_t epoch;
    Store *stores; int32_t nstores, sroom;
    Line *lines; int32_t nlines, lroom;
} Block;

typedef struct { uint64_t address; uint32_t *clock; } Sync;

typedef struct {
    Launch *l; Block *block; Warp *w; int32_t wi, pc; uint32_t mask;
    Word ***pages; Sync *syncs; int32_t nsyncs, srooms;
    Store *ended; int64_t nended, eroom;
    uint64_t random; jmp_buf out;
} Machine;

static inline uint32_t dice(Machine *m) { /* xorshift64* */
    m->random ^= m->random >> 12; m->random ^= m->random << 25; m->random ^= m->random >> 27;
    return (uint32_t)((m->random * 2685821657736338717ull) >> 32);
}
static inline void *grow(void *p, int32_t *room, size_t size) {
    *room = *room ? 2 * *room : 64;
    return realloc(p, (size_t)*room * size);
}
static _Noreturn void fault(Machine *m, int kind, int lane, uint64_t address, int64_t size) {
    Launch *l = m->l;
    l->fault = kind; l->pc = m->pc; l->warp = m->wi; l->lane = lane; l->address = address; l->size = size;
    if (m->block) memcpy(l->block, m->block->id, sizeof l->block);
    longjmp(m->out, 1);
}
static inline int first_lane(uint32_t mask) { return __builtin_ctz(mask); }
static inline uint64_t get64(const Warp *w, int32_t u, int l) {
    return w->r[u * LANES + l] | (uint64_t)w->r[(u + 1) * LANES + l] << 32;
}
static inline float as_float(uint32_t x) { float f; memcpy(&f, &x, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t x; memcpy(&x, &f, 4); return x; }
static inline void set_defined(Warp *w, int32_t u, uint32_t mask, uint32_t value) {
    w->defined[u] = (w->defined[u] & ~mask) | (value & mask);
    if (mask & ~value) for (int k = 0; k < 4; k++) w->bytes[4 * u + k] &= ~(mask & ~value);
}
/* What decides an address, a branch or a lane's part in an instruction must be initialised. */
static inline void need(Machine *m, uint32_t defined) {
    uint32_t bad = m->mask & ~defined;
    if (bad) fault(m, FAULT_UNINITIALISED, first_lane(bad), 0, 0);
}
#endif

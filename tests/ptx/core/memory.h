/* Global and shared memory: bounds, alignment, initialisation, races, late stores, late copies. */
#include "defined.h"

static void race(Machine *m, int kind, int lane, uint64_t address, int pc, uint32_t warp, int other_lane) {
    Launch *l = m->l;
    int block = kind == FAULT_GLOBAL_RACE ? (int)(warp / l->warps) : m->block->linear;
    l->other_pc = pc; l->other_warp = (int)(warp % l->warps); l->other_lane = other_lane;
    l->other_block[0] = block % l->grid[0];
    l->other_block[1] = block / l->grid[0] % l->grid[1];
    l->other_block[2] = block / l->grid[0] / l->grid[1];
    fault(m, kind, lane, address, 0);
}

/* --- shared memory: warps of a block are ordered by its barriers alone, so an epoch says everything --- */

static inline uint32_t shared_at(Machine *m, uint64_t address, int size, int lane) {
    if (address < SHARED_BASE || address + size > (uint64_t)SHARED_BASE + m->l->shared)
        fault(m, FAULT_SHARED_BOUNDS, lane, address, size);
    if (address % size) fault(m, FAULT_ALIGNMENT, lane, address, size);
    return (uint32_t)(address - SHARED_BASE);
}
/* States of an access: those that any of its bytes has, and that all have. */
typedef struct { uint8_t any, all; } States;
static inline States states_of(const uint8_t *s, int size) {
    if (size < 8) {
        States found = {s[0], s[0]};
        for (int k = 1; k < size; k++) { found.any |= s[k]; found.all &= s[k]; }
        return found;
    }
    uint64_t x, y; /* 8 or 16 bytes */
    memcpy(&x, s, 8); memcpy(&y, s + size - 8, 8);
    uint64_t any = x | y, all = ~(x & y);
    const uint64_t initialised = 0x0101010101010101ull * INITIALISED, flying = 0x0101010101010101ull * FLYING;
    return (States){any & flying ? FLYING : 0, all & initialised ? 0 : INITIALISED};
}
static void in_flight(Machine *m, uint32_t at, int size, int lane) { /* name the copy */
    for (int k = 0; k < m->l->warps; k++) for (int j = 0; j < m->block->warps[k].ncopies; j++) {
        const Copy *c = m->block->warps[k].copies + j;
        if (c->target < at + (uint32_t)size && at < c->target + c->size)
            race(m, FAULT_IN_FLIGHT, lane, (at > c->target ? at : c->target) + SHARED_BASE, c->pc, (uint32_t)k, c->lane);
    }
}
static inline uint32_t shared_read(Machine *m, uint32_t at, int size, int lane) {
    Block *b = m->block; States states = states_of(b->state + at, size);
    if (states.any & FLYING) in_flight(m, at, size, lane);
    if (m->l->detect) for (Byte *s = b->shadow + at, *end = s + size; s < end; s++) {
        if (s->wepoch == b->epoch && s->writer != m->wi)
            race(m, FAULT_SHARED_RACE, lane, (uint64_t)(s - b->shadow) + SHARED_BASE, s->wpc, s->writer, s->wlane);
        if (s->repoch != b->epoch) { s->repoch = b->epoch; s->readers = 0; }
        s->readers |= 1u << m->wi; s->rpc = m->pc; s->rlane = lane;
    }
    return states.all & INITIALISED;
}
static inline void mark_written(Machine *m, uint32_t at, int size, int pc, int lane) {
    for (Byte *s = m->block->shadow + at, *end = s + size; s < end; s++) {
        s->wepoch = m->block->epoch; s->writer = m->wi; s->wpc = pc; s->wlane = lane;
    }
}
/* Replicated layouts let several warps store one value to one place: that alone is exempt. `data` NULL: unknown. */
static inline void shared_write(Machine *m, uint32_t at, const uint8_t *data, int size, int lane, uint8_t state) {
    Block *b = m->block; uint32_t me = 1u << m->wi;
    if (states_of(b->state + at, size).any & FLYING) in_flight(m, at, size, lane);
    if (m->l->detect) {
        for (int k = 0; k < size; k++) {
            const Byte *s = b->shadow + at + k;
            if (s->wepoch == b->epoch && s->writer != m->wi && !(data && data[k] == b->shared[at + k]))
                race(m, FAULT_SHARED_RACE, lane, at + k + SHARED_BASE, s->wpc, s->writer, s->wlane);
            if (s->repoch == b->epoch && (s->readers & ~me))
                race(m, FAULT_SHARED_RACE, lane, at + k + SHARED_BASE, s->rpc, (uint32_t)__builtin_ctz(s->readers & ~me), s->rlane);
        }
        mark_written(m, at, size, m->pc, lane);
    }
    memset(b->state + at, state, (size_t)size);
    if (data) memcpy(b->shared + at, data, (size_t)size);
}

/* --- global memory: vector clocks --- */

static inline const Buffer *buffer_of(Machine *m, uint64_t address, int size, int lane, const Buffer **hint) {
    const Buffer *b = *hint;
    if (b && address >= b->start && address + size <= b->end) goto found;
    for (b = m->l->buffers; b < m->l->buffers + m->l->nbuffers; b++)
        if (address >= b->start && address + size <= b->end) goto found;
    fault(m, FAULT_BOUNDS, lane, address, size);
found:
    if (address % size) fault(m, FAULT_ALIGNMENT, lane, address, size);
    *hint = b;
    return b;
}
static inline int ordered(Machine *m, uint32_t other, uint32_t clock) {
    int warps = m->l->warps;
    if ((int)(other / warps) == m->block->linear) return m->w->clock[other % warps] >= clock;
    return m->w->foreign && m->w->foreign[other] >= clock;
}
static void touch(Machine *m, const Buffer *b, uint64_t address, int size, int lane, int write) {
    uint32_t me = (uint32_t)(m->block->linear * m->l->warps + m->wi), clock = m->w->clock[m->wi];
    uint64_t from = address - (m->l->regions[2 * b->region] & ~3ull);
    for (uint64_t at = from; at < from + size; at = (at | 3) + 1) {
        Word **page = &m->pages[b->region][at / 4 / WORDS_PAGE];
        if (!*page) *page = calloc(WORDS_PAGE, sizeof(Word));
        Word *x = *page + at / 4 % WORDS_PAGE;
        uint64_t end = from + size < (at | 3) + 1 ? from + size : (at | 3) + 1;
        uint8_t mask = (uint8_t)(((1 << (end - at)) - 1) << (at & 3));
        if (x->wclock && (x->wmask & mask) && x->writer != me && !ordered(m, x->writer, x->wclock))
            race(m, FAULT_GLOBAL_RACE, lane, address, x->wpc, x->writer, x->wlane);
        if (write) {
            for (int i = 0; i < 2; i++)
                if (x->rclock[i] && x->reader[i] != me && !ordered(m, x->reader[i], x->rclock[i]))
                    race(m, FAULT_GLOBAL_RACE, lane, address, x->rpc[i], x->reader[i], x->rlane[i]);
            x->wclock = clock; x->writer = me; x->wpc = m->pc; x->wlane = lane; x->wmask = mask;
        } else { /* the first reader and the last */
            int i = x->rclock[0] && x->reader[0] != me;
            x->rclock[i] = clock; x->reader[i] = me; x->rpc[i] = m->pc; x->rlane[i] = lane;
        }
    }
}

/* Stores that other blocks do not see yet: a log, and lines that the block's own loads look into. */
static Line *line_of(Block *b, uint64_t line, int make) {
    if (make && 2 * (b->nlines + 1) > b->lroom) {
        Line *old = b->lines; int32_t room = b->lroom;
        b->lroom = room ? 2 * room : 64; b->lines = calloc((size_t)b->lroom, sizeof(Line)); b->nlines = 0;
        for (int i = 0; i < room; i++) if (old[i].mask) *line_of(b, old[i].line, 1) = old[i];
        free(old);
    }
    if (!b->lroom) return NULL;
    uint32_t at = (uint32_t)(line * 0x9E3779B97F4A7C15ull >> 32) & (uint32_t)(b->lroom - 1);
    for (; b->lines[at].mask; at = (at + 1) & (uint32_t)(b->lroom - 1))
        if (b->lines[at].line == line) return b->lines + at;
    if (!make) return NULL;
    b->nlines++; b->lines[at].line = line;
    return b->lines + at;
}
static void overlay(Block *b, const Store *s) { /* at most 16 aligned bytes: within one line of 32 */
    Line *line = line_of(b, s->address >> 5, 1);
    line->mask |= (uint32_t)(((1ull << s->size) - 1) << (s->address & 31));
    memcpy(line->data + (s->address & 31), s->data, s->size);
}
static inline void read_global(Machine *m, uint64_t address, uint8_t *to, int size) {
    memcpy(to, (const void *)address, (size_t)size);
    if (!m->block->nlines) return;
    const Line *line = line_of(m->block, address >> 5, 0);
    if (line) for (int i = 0; i < size; i++) if (line->mask >> ((address & 31) + i) & 1) to[i] = line->data[(address & 31) + i];
}
static inline void write_global(Machine *m, uint64_t address, const uint8_t *from, int size) {
    Block *b = m->block;
    if (!m->l->late_stores) { memcpy((void *)address, from, (size_t)size); return; }
    if (b->nstores == b->sroom) b->stores = grow(b->stores, &b->sroom, sizeof(Store));
    Store *s = b->stores + b->nstores++;
    s->address = address; s->size = size; s->warp = m->wi; s->clock = m->w->clock[m->wi];
    memcpy(s->data, from, (size_t)size);
    overlay(b, s);
}
/* A release publishes what happened before it: the warp's own stores, and those of warps it met at a barrier. */
static void publish(Machine *m) {
    Block *b = m->block; int kept = 0;
    memset(b->lines, 0, sizeof(Line) * (size_t)b->lroom); b->nlines = 0;
    for (int i = 0; i < b->nstores; i++) {
        Store *s = b->stores + i;
        if (m->w->clock[s->warp] >= s->clock) memcpy((void *)s->address, s->data, s->size);
        else { b->stores[kept++] = *s; overlay(b, s); }
    }
    b->nstores = kept;
}
static uint32_t *sync_clock(Machine *m, uint64_t address, int make) {
    for (int i = 0; i < m->nsyncs; i++) if (m->syncs[i].address == address) return m->syncs[i].clock;
    if (!make) return NULL;
    if (m->nsyncs == m->srooms) m->syncs = grow(m->syncs, &m->srooms, sizeof(Sync));
    size_t n = (size_t)m->l->warps * m->l->grid[0] * m->l->grid[1] * m->l->grid[2];
    m->syncs[m->nsyncs] = (Sync){address, calloc(n, 4)};
    return m->syncs[m->nsyncs++].clock;
}
static void join(uint32_t *to, const uint32_t *from, size_t n) {
    for (size_t i = 0; i < n; i++) if (from[i] > to[i]) to[i] = from[i];
}
static void release(Machine *m, uint64_t address) {
    size_t n = (size_t)m->l->warps * m->l->grid[0] * m->l->grid[1] * m->l->grid[2];
    uint32_t *clock = sync_clock(m, address, 1);
    if (m->w->foreign) join(clock, m->w->foreign, n);
    join(clock + (size_t)m->block->linear * m->l->warps, m->w->clock, (size_t)m->l->warps);
    publish(m);
    m->w->clock[m->wi]++;
}
static void acquire(Machine *m, uint64_t address) {
    size_t n = (size_t)m->l->warps * m->l->grid[0] * m->l->grid[1] * m->l->grid[2];
    const uint32_t *clock = sync_clock(m, address, 0);
    if (!clock) return;
    if (!m->w->foreign) m->w->foreign = calloc(n, 4);
    join(m->w->foreign, clock, n);
}

/* --- instructions --- */

static void count_sectors(uint64_t *total, const uint64_t *address, uint32_t mask) {
    uint64_t seen[64]; int n = 0;
    EACH_LANE if (mask >> l & 1) {
        int i = 0; uint64_t sector = address[l] >> 5;
        if (n && seen[n - 1] == sector) continue;
        while (i < n && seen[i] != sector) i++;
        if (i == n) seen[n++] = sector;
    }
    *total += (uint64_t)n;
}
/* Wavefronts beyond the least that an access needs: 32 banks of 4 bytes, groups of 128 bytes at a time. An access
   is aligned, so its banks are hit together and count as one. */
static void count_conflicts(uint64_t *total, const uint64_t *address, uint32_t mask, int size) {
    int unit = size < 4 ? 4 : size, group = 128 / unit;
    for (int first = 0; first < LANES; first += group) {
        uint32_t word[32][32]; int depth[32] = {0}, worst = 1;
        for (int l = first; l < first + group; l++) if (mask >> l & 1) {
            uint32_t x = (uint32_t)address[l] / (uint32_t)unit, bank = x % (uint32_t)group; int i = 0;
            while (i < depth[bank] && word[bank][i] != x) i++;
            if (i == depth[bank]) word[bank][depth[bank]++] = x;
            if (depth[bank] > worst) worst = depth[bank];
        }
        *total += (uint64_t)(worst - 1);
    }
}
static void addresses(Machine *m, const Ins *i, uint64_t *out) {
    need(m, m->w->defined[i->a]);
    EACH_LANE out[l] = (i->flags & FLAG_SHARED ? m->w->r[i->a * LANES + l] : get64(m->w, i->a, l)) + (uint64_t)i->imm;
}
static void put(Machine *m, int32_t unit, int wide, int size, int lane, const uint8_t *from, int is_signed) {
    uint64_t x = 0;
    if (size == 4 && !wide) { memcpy(m->w->r + unit * LANES + lane, from, 4); return; } /* nearly all: a fixed size is fast */
    memcpy(&x, from, (size_t)size);
    if (is_signed && size < 8) x = (uint64_t)((int64_t)(x << (64 - 8 * size)) >> (64 - 8 * size));
    m->w->r[unit * LANES + lane] = (uint32_t)x;
    if (wide) m->w->r[(unit + 1) * LANES + lane] = (uint32_t)(x >> 32);
}
/* Of a register loaded from shared memory that is initialised in part: each byte is what its place is. */
static __attribute__((noinline, cold)) void partly_loaded(Machine *m, const Ins *i, int32_t d, int offset, const uint64_t *at, uint32_t good) {
    Planes p[2] = {alike(good), alike(good)};
    EACH_LANE if (m->mask & ~good & 1u << l) {
        const uint8_t *s = m->block->state + at[l] - SHARED_BASE + offset;
        for (int k = 0; k < 8; k++) { /* zeros follow, or what the last byte's sign is */
            int there = k < i->size ? s[k] : i->flags & FLAG_SIGNED ? s[i->size - 1] : INITIALISED;
            p[k / 4].byte[k % 4] |= (uint32_t)(there == INITIALISED) << l;
        }
    }
    if (i->wide) set_wide(m->w, d, m->mask, p[0], p[1]); else set_narrow(m->w, d, m->mask, p[0]);
}
static void load(Machine *m, const Ins *i) {
    Warp *w = m->w; uint64_t at[LANES]; int bytes = i->size * i->vec; uint32_t good = 0;
    const Buffer *hint = NULL;
    addresses(m, i, at);
    EACH_LANE if (m->mask >> l & 1) {
        uint8_t data[16]; uint32_t initialised = 1;
        if (i->flags & FLAG_SHARED) {
            uint32_t s = shared_at(m, at[l], bytes, l);
            initialised = shared_read(m, s, bytes, l);
            if (bytes == 16) memcpy(data, m->block->shared + s, 16); else memcpy(data, m->block->shared + s, (size_t)bytes);
        } else {
            const Buffer *b = buffer_of(m, at[l], bytes, l, &hint);
            m->l->traffic[2 * (b - m->l->buffers)] += (uint64_t)bytes;
            if (m->l->detect) touch(m, b, at[l], bytes, l, 0);
            read_global(m, at[l], data, bytes);
        }
        good |= initialised << l;
        for (int k = 0; k < i->vec; k++) {
            int32_t d = m->l->lists[i->list + k];
            if (d >= 0) put(m, d, i->wide, i->size, l, data + k * i->size, i->flags & FLAG_SIGNED);
        }
    }
    for (int k = 0; k < i->vec; k++) {
        int32_t d = m->l->lists[i->list + k];
        if (d >= 0 && m->mask & ~good) partly_loaded(m, i, d, k * i->size, at, good);
        else if (d >= 0) for (int n = 0; n <= i->wide; n++) set_defined(w, d + n, m->mask, ~0u);
    }
    if (i->flags & FLAG_SHARED) { count_conflicts(&m->l->conflicts, at, m->mask, bytes); return; }
    m->l->loaded[bytes] += (uint64_t)bytes * __builtin_popcount(m->mask);
    count_sectors(&m->l->load_sectors, at, m->mask);
}
static void store(Machine *m, const Ins *i) {
    Warp *w = m->w; uint64_t at[LANES]; int bytes = i->size * i->vec; uint32_t good = ~0u;
    const Buffer *hint = NULL;
    addresses(m, i, at);
    for (int k = 0; k < i->vec; k++) good &= w->defined[m->l->lists[i->list + k]];
    if (m->mask & ~good) {
        good = ~0u;
        for (int k = 0; k < i->vec; k++) good &= taken_defined(w, m->l->lists[i->list + k], i->size);
        if (!(i->flags & FLAG_SHARED)) need(m, good);
    }
    EACH_LANE if (m->mask >> l & 1) {
        uint8_t data[16];
        for (int k = 0; k < i->vec; k++) {
            int32_t s = m->l->lists[i->list + k];
            uint64_t x = i->size == 8 ? get64(w, s, l) : w->r[s * LANES + l];
            memcpy(data + k * i->size, &x, i->size);
        }
        if (i->flags & FLAG_SHARED) {
            uint32_t to = shared_at(m, at[l], bytes, l);
            shared_write(m, to, data, bytes, l, good >> l & 1);
            for (int k = 0; k < bytes && !(good >> l & 1); k++) {
                int32_t s = m->l->lists[i->list + k / i->size] + k % i->size / 4;
                m->block->state[to + k] = byte_defined(w, s, k % i->size % 4) >> l & 1;
            }
        } else {
            const Buffer *b = buffer_of(m, at[l], bytes, l, &hint);
            m->l->traffic[2 * (b - m->l->buffers) + 1] += (uint64_t)bytes;
            if (m->l->detect) touch(m, b, at[l], bytes, l, 1);
            write_global(m, at[l], data, bytes);
        }
    }
    if (i->flags & FLAG_SHARED) { count_conflicts(&m->l->conflicts, at, m->mask, bytes); return; }
    m->l->stored[bytes] += (uint64_t)bytes * __builtin_popcount(m->mask);
    count_sectors(&m->l->store_sectors, at, m->mask);
}
static void atomic(Machine *m, const Ins *i) {
    Warp *w = m->w; uint64_t at[LANES]; const Buffer *hint = NULL;
    addresses(m, i, at);
    need(m, w->defined[i->b]);
    EACH_LANE if (m->mask >> l & 1) {
        uint32_t old, operand = w->r[i->b * LANES + l], now;
        buffer_of(m, at[l], 4, l, &hint);
        if (i->flags & FLAG_RELEASE) release(m, at[l]);
        memcpy(&old, (void *)at[l], 4);
        switch (i->op) {
        case OP_ATOM_ADD: now = old + operand; break;
        case OP_ATOM_MAX_S: now = (int32_t)old > (int32_t)operand ? old : operand; break;
        case OP_ATOM_MAX_U: now = old > operand ? old : operand; break;
        default: now = operand; break; /* exchange */
        }
        memcpy((void *)at[l], &now, 4);
        if (i->flags & FLAG_ACQUIRE) acquire(m, at[l]);
        if (i->d >= 0) w->r[i->d * LANES + l] = old;
    }
    if (i->d >= 0) set_defined(w, i->d, m->mask, ~0u);
    m->l->loaded[4] += 4u * __builtin_popcount(m->mask);
    m->l->stored[4] += 4u * __builtin_popcount(m->mask);
}

/* --- cp.async --- */

static void deliver(Machine *m, Copy *c) {
    uint8_t data[16] = {0};
    if (c->read) read_global(m, c->source, data, c->read);
    memcpy(m->block->shared + c->target, data, c->size);
}
static void copy(Machine *m, const Ins *i) {
    Warp *w = m->w; uint64_t to[LANES], from[LANES]; const Buffer *hint = NULL; int bytes = i->size;
    Ins source = *i;
    addresses(m, i, to);
    source.a = i->b; source.imm = m->l->lists[i->list]; source.flags &= (uint16_t)~FLAG_SHARED;
    addresses(m, &source, from);
    need(m, w->defined[i->c]);
    int at_once = m->l->copies == 0 || (m->l->copies == 2 && dice(m) % 2);
    EACH_LANE if (m->mask >> l & 1) {
        int read = (int)w->r[i->c * LANES + l];
        uint32_t target = shared_at(m, to[l], bytes, l);
        if (read > 0) {
            const Buffer *b = buffer_of(m, from[l], bytes, l, &hint);
            m->l->traffic[2 * (b - m->l->buffers)] += (uint64_t)read;
            if (m->l->detect) touch(m, b, from[l], bytes, l, 0);
        }
        shared_write(m, target, NULL, bytes, l, INITIALISED | FLYING);
        if (w->ncopies == w->room) w->copies = grow(w->copies, &w->room, sizeof(Copy));
        Copy *c = w->copies + w->ncopies++;
        *c = (Copy){from[l], target, (uint8_t)bytes, (uint8_t)read, (uint8_t)l, (uint8_t)at_once, w->group, m->pc};
        if (at_once) deliver(m, c);
        if (read > 0) m->l->loaded[16] += (uint64_t)read;
    }
    count_sectors(&m->l->load_sectors, from, m->mask);
}
/* The groups up to the newest `left` are complete: their data is there, for this warp; others need a barrier. */
static void wait_copies(Machine *m, int32_t left) {
    Warp *w = m->w; int kept = 0;
    for (int k = 0; k < w->ncopies; k++) {
        Copy *c = w->copies + k;
        if (c->group >= w->group - left) { w->copies[kept++] = *c; continue; }
        if (!c->done) deliver(m, c);
        memset(m->block->state + c->target, INITIALISED, c->size);
        if (m->l->detect) mark_written(m, c->target, c->size, c->pc, c->lane);
    }
    w->ncopies = kept;
}

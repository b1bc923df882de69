/* The machine: warps that share an instruction stream, a scheduler by seed, barriers, divergence. */
#include "memory.h"
#include "alu.h"
#include "tensor.h"

static void select_lanes(Warp *w) { /* the lanes at the lowest place go on; others wait until they reach it */
    int32_t low = INT32_MAX, next = INT32_MAX;
    w->mask = 0;
    EACH_LANE if (w->alive >> l & 1) {
        if (w->lanepc[l] < low) { next = low; low = w->lanepc[l]; }
        else if (w->lanepc[l] > low && w->lanepc[l] < next) next = w->lanepc[l];
    }
    EACH_LANE if (w->alive >> l & 1 && w->lanepc[l] == low) w->mask |= 1u << l;
    w->pc = low; w->next_pc = next;
}
static void settle(Warp *w) {
    if (w->mask == w->alive) return;
    EACH_LANE if (w->mask >> l & 1) w->lanepc[l] = w->pc;
    select_lanes(w);
}
static void branch(Machine *m, const Ins *i, uint32_t taken) {
    Warp *w = m->w;
    if (taken == w->mask) w->pc = (int32_t)i->imm;
    else if (!taken) w->pc++;
    else {
        EACH_LANE if (w->mask >> l & 1) w->lanepc[l] = taken >> l & 1 ? (int32_t)i->imm : w->pc + 1;
        select_lanes(w);
        return;
    }
    settle(w);
}
static void leave(Machine *m) {
    Warp *w = m->w;
    w->alive &= ~m->mask;
    if (w->alive) { EACH_LANE if (w->mask & ~m->mask & 1u << l) w->lanepc[l] = w->pc + 1; select_lanes(w); }
    else { w->done = 1; m->block->live--; }
}
static void special(Machine *m, const Ins *i) {
    const Block *b = m->block; const Launch *l0 = m->l;
    EACH_LANE if (m->mask >> l & 1) {
        uint32_t v;
        switch (i->imm) {
        case SPECIAL_TID: v = (uint32_t)(m->wi * LANES + l); break;
        case SPECIAL_NTID: v = (uint32_t)(l0->warps * LANES); break;
        case SPECIAL_LANEID: v = (uint32_t)l; break;
        case SPECIAL_ZERO: v = 0; break;
        case SPECIAL_CTAID_X: case SPECIAL_CTAID_Y: case SPECIAL_CTAID_Z: v = (uint32_t)b->id[i->imm - SPECIAL_CTAID_X]; break;
        default: v = (uint32_t)l0->grid[i->imm - SPECIAL_NCTAID_X];
        }
        m->w->r[i->d * LANES + l] = v;
    }
    set_defined(m->w, i->d, m->mask, ~0u);
}
static void parameter(Machine *m, const Ins *i) {
    EACH_LANE if (m->mask >> l & 1) put(m, i->d, i->wide, i->size, l, m->l->params + i->imm, i->flags & FLAG_SIGNED);
    set_defined(m->w, i->d, m->mask, ~0u);
    if (i->wide) set_defined(m->w, i->d + 1, m->mask, ~0u);
}
static void unpack(Machine *m, const Ins *i) {
    for (int k = 0; k < 2; k++) {
        int32_t d = m->l->lists[i->list + k];
        if (d < 0) continue;
        EACH_LANE if (m->mask >> l & 1) {
            uint32_t x = m->w->r[i->a * LANES + l];
            m->w->r[d * LANES + l] = i->size == 8 ? m->w->r[(i->a + k) * LANES + l] : x >> 16 * k & 0xffff;
        }
        if (!(m->mask & ~m->w->defined[i->a])) set_defined(m->w, d, m->mask, ~0u);
        else if (i->size == 8) set_narrow(m->w, d, m->mask, planes_of(m->w, i->a + k));
        else { /* zeros follow the half */
            Planes p = {{byte_defined(m->w, i->a, 2 * k), byte_defined(m->w, i->a, 2 * k + 1), ~0u, ~0u}};
            set_narrow(m->w, d, m->mask, p);
        }
    }
}
static void fence_all(Machine *m) { /* no address: publishes stores; ordering needs an atomic */
    if (m->l->late_stores) publish(m);
}
static void execute(Machine *m, const Ins *i) {
    Warp *w = m->w;
    if (i->op < OP_LAST_ALU) { arithmetic(m, i); return; }
    switch (i->op) {
    case OP_SELP: choose(m, i); break;
    case OP_SETP_S32: case OP_SETP_U32: case OP_SETP_S64: case OP_SETP_U64: case OP_SETP_F32: case OP_SETP_U16: case OP_SETP_S16: compare(m, i); break;
    case OP_AND_PRED: case OP_OR_PRED: case OP_XOR_PRED: case OP_NOT_PRED: case OP_MOV_PRED: logic(m, i); break;
    case OP_LD: load(m, i); break;
    case OP_ST: store(m, i); break;
    case OP_ATOM_ADD: case OP_ATOM_MAX_S: case OP_ATOM_MAX_U: case OP_ATOM_EXCH: atomic(m, i); break;
    case OP_CP_ASYNC: copy(m, i); break;
    case OP_CP_COMMIT: whole_warp(m); w->group++; break;
    case OP_CP_WAIT: whole_warp(m); wait_copies(m, (int32_t)i->imm); break;
    case OP_PARAM: parameter(m, i); break;
    case OP_SPECIAL: special(m, i); break;
    case OP_UNPACK: unpack(m, i); break;
    case OP_SHFL_BFLY: case OP_SHFL_IDX: case OP_SHFL_UP: case OP_SHFL_DOWN: shuffle(m, i); break;
    case OP_REDUX_ADD: case OP_REDUX_MIN_S: case OP_REDUX_MAX_S: case OP_REDUX_MIN_U: case OP_REDUX_MAX_U:
    case OP_REDUX_AND: case OP_REDUX_OR: case OP_REDUX_XOR: reduce(m, i); break;
    case OP_MMA: mma(m, i); break;
    case OP_LDMATRIX: ldmatrix(m, i); break;
    case OP_STMATRIX: stmatrix(m, i); break;
    case OP_WGMMA: wgmma(m, i); break;
    case OP_WGMMA_COMMIT: whole_warp(m); w->pgroup++; break;
    case OP_WGMMA_WAIT: whole_warp(m); wait_products(m, (int32_t)i->imm); break;
    case OP_FENCE: fence_all(m); break;
    case OP_NOP: break;
    default: fault(m, FAULT_UNKNOWN, 0, 0, 0);
    }
}
static void run_warp(Machine *m, int64_t quantum) {
    Warp *w = m->w; Launch *l = m->l;
    while (quantum-- && !w->done && !w->waiting) {
        const Ins *i = l->code + w->pc;
        m->pc = w->pc; m->mask = w->mask;
        if (--l->budget < 0) fault(m, FAULT_ENDLESS, 0, 0, 0);
        if (i->guard) {
            int32_t p = abs(i->guard) - 1;
            need(m, w->pdefined[p]);
            m->mask &= i->guard > 0 ? w->pred[p] : ~w->pred[p];
        }
        l->instructions++; l->thread_instructions += (uint64_t)__builtin_popcount(m->mask);
        if (i->op == OP_BRA) { branch(m, i, m->mask); continue; }
        if (m->mask) {
            if (i->op == OP_RET) { leave(m); if (w->done || m->mask) continue; }
            else if (i->op == OP_BAR) {
                if (m->mask != w->alive) fault(m, FAULT_LANES, first_lane(m->mask), 0, 0);
                w->waiting = 1; l->barriers++;
            } else execute(m, i);
        }
        w->pc++;
        if (w->mask != w->alive && w->pc >= w->next_pc) settle(w);
    }
}
static void open_barrier(Machine *m) {
    Block *b = m->block; int n = m->l->warps; uint32_t *foreign = NULL;
    size_t all = (size_t)n * m->l->grid[0] * m->l->grid[1] * m->l->grid[2];
    uint32_t joint[MAX_WARPS];
    for (int k = 0; k < n; k++) joint[k] = b->warps[k].clock[k];
    for (int k = 0; k < n; k++) if (b->warps[k].foreign) {
        if (!foreign) foreign = calloc(all, 4);
        join(foreign, b->warps[k].foreign, all);
    }
    for (int k = 0; k < n; k++) {
        Warp *w = b->warps + k;
        memcpy(w->clock, joint, sizeof joint[0] * (size_t)n);
        w->clock[k]++; w->waiting = 0;
        if (foreign) { if (!w->foreign) w->foreign = malloc(all * 4); memcpy(w->foreign, foreign, all * 4); }
    }
    free(foreign);
    b->epoch++;
}
static void open_block(Machine *m, Block *b, int linear) {
    Launch *l = m->l;
    b->linear = linear; b->live = l->warps; b->epoch = 1; b->finished = 0; b->nstores = b->nlines = 0;
    if (b->lroom) memset(b->lines, 0, sizeof(Line) * (size_t)b->lroom);
    b->id[0] = linear % l->grid[0]; b->id[1] = linear / l->grid[0] % l->grid[1]; b->id[2] = linear / l->grid[0] / l->grid[1];
    if (!b->shared && l->shared) {
        b->shared = malloc((size_t)l->shared); b->state = malloc((size_t)l->shared);
        if (l->detect) b->shadow = malloc(sizeof(Byte) * (size_t)l->shared);
    }
    if (l->shared) { memset(b->shared, 0xff, (size_t)l->shared); memset(b->state, 0, (size_t)l->shared); }
    if (b->shadow) memset(b->shadow, 0, sizeof(Byte) * (size_t)l->shared);
    for (int k = 0; k < l->warps; k++) {
        Warp *w = b->warps + k;
        if (!w->r) {
            w->r = calloc((size_t)l->nunits * LANES, 4); w->defined = malloc(4 * (size_t)l->nunits); w->bytes = malloc(16 * (size_t)l->nunits);
            w->pred = calloc((size_t)l->npreds + 1, 4); w->pdefined = malloc(4 * ((size_t)l->npreds + 1));
            for (int u = 0; u < l->nconstants; u++) for (int n = 0; n < LANES; n++) w->r[(l->nunits - l->nconstants + u) * LANES + n] = l->constants[u];
        }
        memset(w->defined, 0, 4 * (size_t)l->nunits); memset(w->defined, 0xff, 8); /* unit 0: the constant 0 */
        memset(w->bytes, 0, 16 * (size_t)l->nunits);
        memset(w->defined + l->nunits - l->nconstants, 0xff, 4 * (size_t)l->nconstants);
        memset(w->pdefined, 0, 4 * ((size_t)l->npreds + 1));
        w->pred[0] = ~0u; w->pdefined[0] = ~0u; /* true */
        w->pc = 0; w->mask = w->alive = ~0u; w->waiting = w->done = 0;
        w->ncopies = w->group = w->nproducts = w->pgroup = 0;
        memset(w->clock, 0, sizeof w->clock); w->clock[k] = 1;
        free(w->foreign); w->foreign = NULL;
    }
}
static void close_block(Machine *m, Block *b) { /* what it published nobody yet sees is seen when the launch ends */
    for (int k = 0; k < b->nstores; k++) {
        if (m->nended == m->eroom) { m->eroom = m->eroom ? 2 * m->eroom : 256; m->ended = realloc(m->ended, sizeof(Store) * (size_t)m->eroom); }
        m->ended[m->nended++] = b->stores[k];
    }
    b->nstores = 0;
}
static void run_blocks(Machine *m, Block *blocks, int resident, int total, const int32_t *order) {
    Launch *l = m->l; int next = 0, open = 0;
    while (open < resident && next < total) open_block(m, blocks + open++, order[next++]);
    while (open) {
        int at = (int)(dice(m) % (uint32_t)open), ready[MAX_WARPS], n = 0;
        Block *b = m->block = blocks + at;
        for (int k = 0; k < l->warps; k++) if (!b->warps[k].done && !b->warps[k].waiting) ready[n++] = k;
        if (!n) { open_barrier(m); continue; }
        m->wi = ready[l->seed ? dice(m) % (uint32_t)n : 0]; m->w = b->warps + m->wi;
        run_warp(m, l->quantum ? 1 + dice(m) % (uint32_t)l->quantum : INT64_MAX);
        if (b->live) continue;
        close_block(m, b);
        if (next < total) open_block(m, b, order[next++]);
        else if (--open != at) { Block swap = *b; *b = blocks[open]; blocks[open] = swap; }
    }
    for (int64_t k = 0; k < m->nended; k++) memcpy((void *)m->ended[k].address, m->ended[k].data, m->ended[k].size);
}
static void discard(Machine *m, Block *blocks, int resident) {
    for (int k = 0; k < resident; k++) {
        Block *b = blocks + k;
        free(b->shared); free(b->state); free(b->shadow); free(b->stores); free(b->lines);
        for (int j = 0; j < MAX_WARPS; j++) {
            Warp *w = b->warps + j;
            free(w->r); free(w->defined); free(w->bytes); free(w->pred); free(w->pdefined); free(w->copies); free(w->products); free(w->foreign);
        }
    }
    for (int r = 0; r < m->l->nregions; r++) {
        size_t pages = (m->l->regions[2 * r + 1] - (m->l->regions[2 * r] & ~3ull)) / 4 / WORDS_PAGE + 1;
        for (size_t p = 0; p < pages; p++) free(m->pages[r][p]);
        free(m->pages[r]);
    }
    for (int k = 0; k < m->nsyncs; k++) free(m->syncs[k].clock);
    free(m->pages); free(m->syncs); free(m->ended); free(blocks);
}
/* Run a launch to its end or its first fault; the return value is the fault. */
int run_launch(Launch *l) {
    Machine m = {.l = l, .random = 0x9E3779B97F4A7C15ull ^ ((uint64_t)l->seed << 17) ^ l->seed};
    int total = l->grid[0] * l->grid[1] * l->grid[2], resident = l->resident < total ? l->resident : total;
    int32_t *order = malloc(sizeof *order * (size_t)total);
    Block *blocks = calloc((size_t)resident, sizeof(Block));
    fill_halves();
    m.pages = calloc((size_t)l->nregions, sizeof *m.pages);
    for (int r = 0; r < l->nregions; r++)
        m.pages[r] = calloc((l->regions[2 * r + 1] - (l->regions[2 * r] & ~3ull)) / 4 / WORDS_PAGE + 1, sizeof(Word *));
    for (int k = 0; k < total; k++) order[k] = k;
    for (int k = total - 1; l->seed && k > 0; k--) {
        int j = (int)(dice(&m) % (uint32_t)(k + 1)), swap = order[k];
        order[k] = order[j]; order[j] = swap;
    }
    l->fault = 0;
    if (!setjmp(m.out)) run_blocks(&m, blocks, resident, total, order);
    discard(&m, blocks, resident);
    free(order);
    return l->fault;
}
int sizes(int which) { return which ? (int)sizeof(Launch) : (int)sizeof(Ins); }

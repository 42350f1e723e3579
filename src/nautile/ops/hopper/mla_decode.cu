// Absorbed MLA decoding over paged latents: 64 query rows against one split of a request's latents.
//
//   s_rt = scale · q_r · x_t,   o_r = Σ_t softmax(s_r)_t · x_t[: 512]     (see nautile/ops/paged_latents.py)
//
// q and x have 576 dimensions, the first 512 of which are the value, too; a tile of 64 latents is thus loaded once, as
// nine boxes of 64 dimensions, and read twice: along its rows for the scores, across them for the values. The output
// [64, 512] in float32 is 128 registers of 256 threads, so two warpgroups hold one half of it each. The first also
// makes scores and softmax, and hands the weights over through the last box of the tile, whose rotated dimensions
// nobody needs after the scores. While it is at the softmax, the other one multiplies; a loading thread fills the second
// tile meanwhile.
#include "mla_work.cuh"

// One thread.
DEVICE void load(const TensorMap& map_q, const TensorMap& map_cache, const Args& args, const Shared& s, const Work& w) {
    prefetch_map(&map_q);
    prefetch_map(&map_cache);
    barrier_arrive_expecting(s.q_full, TILE_BYTES);
    for (int box = 0; box < BOXES; ++box)
        tile_load(&map_q, s.q_full, s.q + box * BOX_BYTES, box * 64, w.first_row, w.request);
    const int* pages = args.block_table + int64_t(w.request) * args.table_row;
    for (int i = 0; i < w.tiles(); ++i) {
        const int at = w.begin + i * TOKENS, slot = i % 2;
        const int page = pages[at / args.page];
        barrier_wait(s.empty + slot, i / 2 % 2 ^ 1);
        barrier_arrive_expecting(s.full + slot, TILE_BYTES);
        for (int box = 0; box < BOXES; ++box)
            tile_load(&map_cache, s.full + slot, s.tiles + slot * TILE_BYTES + box * BOX_BYTES, box * 64,
                      at % args.page, page);
    }
}

// This thread's rows of the 64 are this one and the one 8 below.
DEVICE int row_of_thread() { return thread_index() % 128 / 32 * 16 + thread_index() % 32 / 4; }

// What follows a request's last latent holds anything; as a value of weight 0 it must be 0, not NaN.
DEVICE void clear_values(uint8_t* boxes, int from) {
    for (int i = thread_index() % 128; i < 4 * TOKENS * 8; i += 128)
        if (i / 8 % TOKENS >= from) reinterpret_cast<Piece*>(boxes)[i] = Piece{0, 0};
}

// o = o · decay + weights · values, for one half of the values.
DEVICE void add_values(float (&o)[HALF / 2], const Shared& s, int slot, int half) {
    const float upper = s.decay[slot * ROWS + row_of_thread()], lower = s.decay[slot * ROWS + row_of_thread() + 8];
#pragma unroll
    for (int j = 0; j < HALF / 8; ++j)
        o[4 * j] *= upper, o[4 * j + 1] *= upper, o[4 * j + 2] *= lower, o[4 * j + 3] *= lower;
    const uint32_t tile = shared_address(s.tiles) + slot * TILE_BYTES;
    product_begin(o);
#pragma unroll
    for (int k = 0; k < TOKENS / 16; ++k)
        product_bf16<HALF, 1>(o, operand(tile + WEIGHTS + k * 32),
                              operand_across(tile + half * 4 * BOX_BYTES + k * 16 * 128, BOX_BYTES), 1);
    product_commit();
    product_wait<0>(o);
    warp_sync();
    if (thread_index() % 32 == 0) barrier_arrive(s.empty + slot);
}

// The thread's elements of one half, divided by the sums of their rows.
DEVICE void store_half(const float (&o)[HALF / 2], const Args& args, const Shared& s, const Work& w, int half) {
    const int rows = args.queries * args.heads;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        const int row = w.first_row + row_of_thread() + 8 * below;
        if (row >= rows) continue;
        const float inverse = s.inverse[row_of_thread() + 8 * below];
        const int64_t place = (int64_t(w.whole ? w.request : w.split) * rows + row) * VALUE;
#pragma unroll
        for (int j = 0; j < HALF / 8; ++j) {
            const int64_t at = place + half * HALF + 8 * j + thread_index() % 4 * 2;
            const float left = o[4 * j + 2 * below] * inverse, right = o[4 * j + 2 * below + 1] * inverse;
            if (w.whole)
                *reinterpret_cast<uint32_t*>(args.out + at) = pack_bf16(left, right);
            else
                *reinterpret_cast<Pair*>(args.part + at) = Pair{left, right};
        }
    }
}

// First warpgroup: scores, softmax, left half of the values.
DEVICE void attend(const Args& args, const Shared& s, const Work& w) {
    const int lane = thread_index() % 32, rows = args.queries * args.heads;
    const uint32_t q = shared_address(s.q), tiles = shared_address(s.tiles);
    const float none = -INFINITY;
    float o[HALF / 2], scores[TOKENS / 2];
    float top[2] = {none, none}, sum[2] = {0.0f, 0.0f};
    int limit[2];  // first latent that a row does not see
#pragma unroll
    for (int i = 0; i < HALF / 2; ++i) o[i] = 0.0f;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        const int query = (w.first_row + row_of_thread() + 8 * below) / args.heads;
        limit[below] = args.causal ? min(w.stop, w.length - args.queries + 1 + query) : w.stop;
    }

    barrier_wait(s.q_full, 0);
    for (int i = 0; i < w.tiles(); ++i) {
        const int slot = i % 2, at = w.begin + i * TOKENS;
        uint8_t* tile = s.tiles + slot * TILE_BYTES;
        barrier_wait(s.full + slot, i / 2 % 2);
        product_begin(scores);
#pragma unroll
        for (int k = 0; k < BOXES * 4; ++k)
            product_bf16<TOKENS, 0>(scores, operand(q + k / 4 * BOX_BYTES + k % 4 * 32),
                                    operand(tiles + slot * TILE_BYTES + k / 4 * BOX_BYTES + k % 4 * 32), k > 0);
        product_commit();
        product_wait<0>(scores);

#pragma unroll
        for (int below = 0; below < 2; ++below) {
            float most = none;
#pragma unroll
            for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = scores[4 * j + 2 * below + e];
                    score = at + 8 * j + lane % 4 * 2 + e < limit[below] ? score * args.scale : none;
                    most = max(most, score);
                }
            most = max(most, exchange(most, 1));
            most = max(top[below], max(most, exchange(most, 2)));
            const float base = most == none ? 0.0f : most;  // −∞ − −∞ is no number
            const float decay = exp2_fast(top[below] - base);
            float added = 0.0f;
#pragma unroll
            for (int j = 0; j < TOKENS / 8; ++j) {
                const float left = exp2_fast(scores[4 * j + 2 * below] - base);
                const float right = exp2_fast(scores[4 * j + 2 * below + 1] - base);
                added += left + right;
                int place = (row_of_thread() + 8 * below) * 128 + 16 * j + lane % 4 * 4;
                place ^= (place >> 7) % 8 << 4;
                *reinterpret_cast<uint32_t*>(tile + WEIGHTS + place) = pack_bf16(left, right);
            }
            sum[below] = sum[below] * decay + added;
            top[below] = most;
            if (lane % 4 == 0) s.decay[slot * ROWS + row_of_thread() + 8 * below] = decay;
        }
        if (at + TOKENS > w.stop) clear_values(tile, w.stop - at);
        copy_fence();
        named_arrive(1 + slot, 256);
        named_sync(3, 128);
        add_values(o, s, slot, 0);
    }

#pragma unroll
    for (int below = 0; below < 2; ++below) {
        float total = sum[below] + exchange(sum[below], 1);
        total += exchange(total, 2);
        const int row = w.first_row + row_of_thread() + 8 * below;
        const bool empty = total == 0.0f;
        if (lane % 4 != 0) continue;
        s.inverse[row_of_thread() + 8 * below] = empty ? 0.0f : 1.0f / total;
        if (row >= rows) continue;
        const float lse = top[below] + log2_fast(total);
        if (w.whole)
            args.lse[(int64_t(w.request) * args.heads + row % args.heads) * args.queries + row / args.heads] =
                empty ? INFINITY : lse * LN2;
        else
            args.part_lse[int64_t(w.split) * rows + row] = empty ? none : lse;
    }
    named_sync(5, 256);
    store_half(o, args, s, w, 0);
}

// Second warpgroup: right half of the values.
DEVICE void follow(const Args& args, const Shared& s, const Work& w) {
    float o[HALF / 2];
#pragma unroll
    for (int i = 0; i < HALF / 2; ++i) o[i] = 0.0f;
    for (int i = 0; i < w.tiles(); ++i) {
        const int slot = i % 2, at = w.begin + i * TOKENS;
        barrier_wait(s.full + slot, i / 2 % 2);
        if (at + TOKENS > w.stop) {
            clear_values(s.tiles + slot * TILE_BYTES + 4 * BOX_BYTES, w.stop - at);
            copy_fence();
        }
        named_sync(1 + slot, 256);
        if (at + TOKENS > w.stop) named_sync(4, 128);
        add_values(o, s, slot, 1);
    }
    named_sync(5, 256);
    store_half(o, args, s, w, 1);
}

KERNEL void LAUNCH_BOUNDS(THREADS)
    mla_decode(PARAMETER TensorMap map_q, PARAMETER TensorMap map_cache, PARAMETER Args args) {
    const Shared s = shared_layout();
    const Work w = find_work(args);
    if (w.request < 0) return;
    const int warp = uniform(thread_index() / 32);
    if (thread_index() == 0) {
        barrier_init(s.q_full, 1);
        for (int slot = 0; slot < 2; ++slot) {
            barrier_init(s.full + slot, 1);
            barrier_init(s.empty + slot, 8);  // warps that multiply
        }
        barrier_init_fence();
    }
    block_sync();
    if (warp >= 8) {
        registers_give<40>();
        if (warp == 8 && thread_index() % 32 == 0) load(map_q, map_cache, args, s, w);
    } else {
        registers_take<232>();
        if (warp < 4)
            attend(args, s, w);
        else
            follow(args, s, w);
    }
}

// Requests of several splits: the mean of their parts, weighted by how much of the softmax each one saw. A warp per row.
KERNEL void LAUNCH_BOUNDS(MERGE_ROWS * 32) mla_merge(PARAMETER Args args) {
    const int rows = args.queries * args.heads, blocks = (rows + MERGE_ROWS - 1) / MERGE_ROWS;
    const int lane = thread_index() % 32, row = block_index() % blocks * MERGE_ROWS + thread_index() / 32;
    const int request = block_index() / blocks;
    const int first = args.ends[request], end = args.ends[request + 1];
    if (end - first == 1 || row >= rows) return;
    float o[VALUE / 32], top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUE / 32; ++i) o[i] = 0.0f;
#pragma unroll 4
    for (int split = first; split < end; ++split) {
        const int64_t place = int64_t(split) * rows + row;
        const float lse = args.part_lse[place], most = max(top, lse), base = most == -INFINITY ? 0.0f : most;
        const float decay = exp2_fast(top - base), weight = exp2_fast(lse - base);
        const Quad* part = reinterpret_cast<const Quad*>(args.part + place * VALUE);
#pragma unroll
        for (int i = 0; i < VALUE / 128; ++i) {
            const Quad piece = part[32 * i + lane];
#pragma unroll
            for (int e = 0; e < 4; ++e) o[4 * i + e] = o[4 * i + e] * decay + piece.element[e] * weight;
        }
        sum = sum * decay + weight;
        top = most;
    }
    const bool empty = sum == 0.0f;
    const float inverse = empty ? 0.0f : 1.0f / sum;
    uint16_t* out = args.out + (int64_t(request) * rows + row) * VALUE;
#pragma unroll
    for (int i = 0; i < VALUE / 128; ++i)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
            *reinterpret_cast<uint32_t*>(out + 128 * i + 4 * lane + e) =
                pack_bf16(o[4 * i + e] * inverse, o[4 * i + e + 1] * inverse);
    if (lane == 0)
        args.lse[(int64_t(request) * args.heads + row % args.heads) * args.queries + row / args.heads] =
            empty ? INFINITY : (top + log2_fast(sum)) * LN2;
}

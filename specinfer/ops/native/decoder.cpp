// The decoder's step on a processor: models/decoder.py in one call, one team of threads, no
// allocation and nothing between the parts but a barrier. What it is made of comes as numbers and
// addresses from ops/native/__init__.py, whose structures are these, field by field.

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <omp.h>

#include "attention.h"
#include "growth.h"
#include "rounding.h"

enum Activation : int64_t { SILU, RELU, GELU, GELU_TANH };

struct Layer {
    const void *attention_norm, *mlp_norm;
    const void *q_norm, *k_norm; // [head_dim] or null
    Weight qkv, output, gate_up, down;
    void *keys, *values; // [kv_heads][slots][head_dim]
    int64_t plan;        // which of the step's lists of segments
};

struct Model {
    int64_t is_bfloat16, num_layers, hidden, heads, kv_heads, head_dim, inner, activation, slots;
    float eps, scale;
    const Layer *layers;
    const void *norm, *embedding; // [hidden]; [vocab][hidden], or null: the head has it
    Weight head;
};

struct Step {
    int64_t num_tokens, num_rows, num_segments;
    const int64_t *tokens, *positions, *writes; // [num_tokens]; the slots that K and V go to
    const int64_t *rows;                        // [num_rows] tokens whose logits are asked for
    const float *cos, *sin;                     // [positions][head_dim / 2]
    const Segment *const *plans;                // per plan [num_segments]
    float *logits;                              // [num_rows][vocab]
    double *seconds;                            // [PARTS], added to, or null
};

// What `Step.seconds` tells apart.
enum Part { LINEARS, HEAD, ATTENTION, NORMS, REST, PARTS };

template <class E>
INLINE void norm_row(const E *x, const void *weight, size_t size, float eps, E *to) {
    // Four sums at a time; in which order does not depend on anything but the size.
    Vector sum[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    for (size_t k = 0; k < size; k += 4 * LANES)
        UNROLL for (size_t i = 0; i < 4; i++) {
            ptrdiff_t left = (ptrdiff_t)size - (ptrdiff_t)(k + i * LANES);
            if (left <= 0) break;
            Vector v = load(x + k + i * LANES, lanes(left));
            sum[i] = fma(v, v, sum[i]);
        }
    float squares = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    Vector factor = splat(1.0f / std::sqrt(squares / size + eps));
    for (size_t k = 0; k < size; k += LANES) {
        Lanes some = lanes(size - k);
        Vector v = load(x + k, some) * factor;
        store(to + k, v * load(static_cast<const E *>(weight) + k, some), some);
    }
}

template <class E>
INLINE void rotate_head(E *x, const float *cos, const float *sin, size_t half) {
    for (size_t i = 0; i < half; i += LANES) {
        Lanes some = lanes(half - i);
        Vector a = load(x + i, some), b = load(x + half + i, some);
        Vector c = load(cos + i, some), s = load(sin + i, some);
        store(x + i, fma(a, c, -(b * s)), some);
        store(x + half + i, fma(b, c, a * s), some);
    }
}

template <class F> INLINE Vector lane_by_lane(Vector x, const F &f) {
    float v[LANES];
    store(v, x);
    for (float &each : v) each = f(each);
    return load(v);
}

INLINE Vector activate(int64_t kind, Vector x) {
    const Vector one = splat(1.0f), zero = splat(0.0f);
    switch (kind) {
    case SILU: return x / (one + exp(zero - x));
    case RELU: return max(zero, x);
    case GELU: return lane_by_lane(x, [](float v) {
        return v * 0.5f * (1.0f + std::erf(v * 0.70710678f));
    });
    default: { // x * sigmoid(2 u) is x / 2 * (1 + tanh(u))
        Vector u = fma(x * x * x, splat(0.044715f), x);
        return x / (one + exp(u * splat(-2 * 0.79788456f)));
    }
    }
}

// gate_up [2 * inner] -> [inner]
template <class E>
INLINE void gate_row(const Model &m, const E *gate_up, E *to, size_t begin, size_t end) {
    for (size_t k = begin; k < end; k += LANES) {
        Lanes some = lanes(end - k);
        Vector up = load(gate_up + m.inner + k, some);
        store(to + k, activate(m.activation, load(gate_up + k, some)) * up, some);
    }
}

// A team's memory for one step.
template <class E> struct Buffers {
    E *hidden, *normed, *qkv, *mixed, *gate_up, *gated;
    Prepared prepared;
    size_t hidden_stride, mixed_stride, gated_stride; // of normed, mixed and gated, elements

    static constexpr size_t pad(size_t bytes) { return (bytes + 63) / 64 * 64; }

    // Lays them out from `at` on; how many bytes that takes.
    size_t lay_out(const Model &m, size_t n, char *at) {
        char *start = at;
        auto take = [&](size_t bytes) {
            char *mine = at;
            at += pad(bytes);
            return mine;
        };
        size_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
        size_t words = 0, numbers = 0; // of a prepared row
        auto fit = [&](const Weight &w) {
            if (!Prepared::serves<E>(w)) return;
            words = std::max(words, Prepared::stride(w));
            numbers = std::max(numbers, Prepared::count(w));
        };
        fit(m.head);
        for (int64_t i = 0; i < m.num_layers; i++) {
            const Layer &layer = m.layers[i];
            for (const Weight *w : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) fit(*w);
        }
        hidden_stride = spread(m.hidden * sizeof(E)) / sizeof(E);
        mixed_stride = spread(q * sizeof(E)) / sizeof(E);
        gated_stride = spread(m.inner * sizeof(E)) / sizeof(E);
        hidden = (E *)take(n * m.hidden * sizeof(E));
        normed = (E *)take(n * hidden_stride * sizeof(E));
        qkv = (E *)take(n * (q + 2 * kv) * sizeof(E));
        mixed = (E *)take(n * mixed_stride * sizeof(E));
        gate_up = (E *)take(n * 2 * m.inner * sizeof(E));
        gated = (E *)take(n * gated_stride * sizeof(E));
        prepared.words = (int32_t *)take(n * words * sizeof(int32_t));
        prepared.numbers = (float *)take(n * numbers * sizeof(float));
        return at - start;
    }
};

// Adds the time since it was last asked to a part's; nothing where nobody wants to know.
class Clock {
  public:
    explicit Clock(double *seconds) : seconds_(seconds) {
        if (seconds_ != nullptr) last_ = omp_get_wtime();
    }

    void tell(Part part) {
        if (seconds_ == nullptr) return;
        double now = omp_get_wtime();
        seconds_[part] += now - last_;
        last_ = now;
    }

  private:
    double *seconds_, last_ = 0;
};

template <class E> class Run {
  public:
    Run(const Model &m, const Step &s, Buffers<E> b, std::atomic<int64_t> *next)
        : m(m), s(s), b(b), next(next), n(s.num_tokens) {}

    void run(Member member) const {
        static thread_local Scratch scratch;
        Clock clock{member.index == 0 ? s.seconds : nullptr};
        for (size_t i = member.begin(n); i < member.end(n); i++) {
            embed(s.tokens[i], b.hidden + i * m.hidden);
            fill_word(b.normed + i * b.hidden_stride, m.hidden);
            fill_word(b.gated + i * b.gated_stride, m.inner);
        }
        for (int64_t layer = 0; layer < m.num_layers; layer++)
            run_layer(member, m.layers[layer], next[layer], scratch, clock);
        // The last layer's barrier has passed: only rows that are asked for are normed.
        for (size_t i = member.begin(s.num_rows); i < member.end(s.num_rows); i++)
            norm_row(b.hidden + s.rows[i] * m.hidden, m.norm, m.hidden, m.eps,
                     b.normed + i * b.hidden_stride);
        prepare(member, m.head, b.normed, b.hidden_stride, s.num_rows);
#pragma omp barrier
        clock.tell(NORMS);
        product(member, m.head, b.normed, b.hidden_stride, (const E *)nullptr, s.logits, s.num_rows);
        clock.tell(HEAD);
    }

  private:
    void embed(size_t token, E *to) const {
        if (m.embedding != nullptr) {
            auto row = static_cast<const E *>(m.embedding) + token * m.hidden;
            std::copy(row, row + m.hidden, to);
            return;
        }
        // The head's panels hold it: word by word, 128 bytes apart.
        const size_t per = 4 / sizeof(E), words = (m.hidden + per - 1) / per;
        auto word = reinterpret_cast<const E *>(m.head.panels + token / WIDTH * words * STEP) +
                    token % WIDTH * per;
        for (size_t k = 0; k < (size_t)m.hidden; k++)
            to[k] = word[k / per * (STEP / sizeof(E)) + k % per];
    }

    // Products read whole words: of what is left of a row's last, zeros times whatever would stand
    // there may be NaN.
    static void fill_word(E *row, size_t size) {
        for (; size % (4 / sizeof(E)) != 0; size++) row[size] = E{};
    }

    void run_layer(Member member, const Layer &layer, std::atomic<int64_t> &counter,
                   Scratch &scratch, Clock &clock) const {
        const size_t dim = m.head_dim, rotated = m.heads + m.kv_heads;
        const size_t wide = (rotated + m.kv_heads) * dim;
        // A row is normed by whom it was embedded by; later layers begin behind a barrier.
        multiply_normed(member, layer.attention_norm, layer.qkv, b.qkv, clock);
        for (size_t i = member.begin(n); i < member.end(n); i++)
            place(layer, i, b.qkv + i * wide, dim, rotated);
#pragma omp barrier
        clock.tell(REST);
        auto k = static_cast<const E *>(layer.keys), v = static_cast<const E *>(layer.values);
        attend(Attention<E>{s.plans[layer.plan], (size_t)s.num_segments, (size_t)m.heads,
                            (size_t)m.kv_heads, m.scale, {k, v, m.slots * dim, dim}, b.qkv, wide,
                            b.mixed, b.mixed_stride},
               counter, scratch);
#pragma omp barrier
        clock.tell(ATTENTION);
        add_product(member, layer.output, b.mixed, b.mixed_stride, clock);
        multiply_normed(member, layer.mlp_norm, layer.gate_up, b.gate_up, clock);
        gate(member);
#pragma omp barrier
        clock.tell(REST);
        add_product(member, layer.down, b.gated, b.gated_stride, clock);
    }

    // out = norm(hidden) @ w.T for all rows. A barrier stands before it, and is passed at its end.
    void multiply_normed(Member member, const void *norm_weight, const Weight &w, E *out,
                         Clock &clock) const {
        norm(member, norm_weight);
        prepare(member, w, b.normed, b.hidden_stride, n);
#pragma omp barrier
        clock.tell(NORMS);
        product(member, w, b.normed, b.hidden_stride, (const E *)nullptr, out, n);
#pragma omp barrier
        clock.tell(LINEARS);
    }

    // hidden += x @ w.T for all rows, between barriers likewise.
    void add_product(Member member, const Weight &w, const E *x, size_t stride,
                     Clock &clock) const {
        if (prepare(member, w, x, stride, n)) {
#pragma omp barrier
        }
        product(member, w, x, stride, b.hidden, b.hidden, n);
#pragma omp barrier
        clock.tell(LINEARS);
    }

    void norm(Member member, const void *weight) const {
        for (size_t i = member.begin(n); i < member.end(n); i++)
            norm_row(b.hidden + i * m.hidden, weight, m.hidden, m.eps, b.normed + i * b.hidden_stride);
    }

    // Whether the weight reads prepared rows, of which every member has then made its share.
    bool prepare(Member member, const Weight &w, const E *x, size_t stride, size_t rows) const {
        bool serves = Prepared::serves<E>(w);
        if (serves) ::prepare(member, w, x, stride, rows, b.prepared);
        return serves;
    }

    template <class O>
    void product(Member member, const Weight &w, const E *x, size_t stride, const E *residual,
                 O *out, size_t rows) const {
        multiply(member, w, x, stride, b.prepared, rows, Target<E, O>{out, residual});
    }

    // Norms and rotates a token's q and k, and stores its k and v.
    void place(const Layer &layer, size_t i, E *heads, size_t dim, size_t rotated) const {
        const float *cos = s.cos + s.positions[i] * (dim / 2);
        const float *sin = s.sin + s.positions[i] * (dim / 2);
        for (size_t h = 0; h < rotated; h++) {
            const void *weight = h < (size_t)m.heads ? layer.q_norm : layer.k_norm;
            if (weight != nullptr) norm_row(heads + h * dim, weight, dim, m.eps, heads + h * dim);
            rotate_head(heads + h * dim, cos, sin, dim / 2);
        }
        for (size_t h = 0; h < (size_t)m.kv_heads; h++) {
            size_t at = (h * m.slots + s.writes[i]) * dim;
            const E *k = heads + (m.heads + h) * dim, *v = heads + (rotated + h) * dim;
            std::copy(k, k + dim, static_cast<E *>(layer.keys) + at);
            std::copy(v, v + dim, static_cast<E *>(layer.values) + at);
        }
    }

    void gate(Member member) const {
        // Parts of 64 elements: of one row as of many.
        size_t parts = (m.inner + 63) / 64;
        for (size_t i = member.begin(n * parts); i < member.end(n * parts); i++) {
            size_t row = i / parts, begin = i % parts * 64, end = begin + 64;
            gate_row(m, b.gate_up + row * 2 * m.inner, b.gated + row * b.gated_stride, begin,
                     end < (size_t)m.inner ? end : m.inner);
        }
    }

    const Model &m;
    const Step &s;
    const Buffers<E> b;
    std::atomic<int64_t> *next; // per layer
    const size_t n;
};

template <class E> void run_step(const Model &model, const Step &step, int threads) {
    static thread_local Scratch memory, counters;
    Buffers<E> buffers;
    size_t bytes = buffers.lay_out(model, step.num_tokens, nullptr);
    buffers.lay_out(model, step.num_tokens, memory.get<char>(bytes));
    auto next = counters.get<std::atomic<int64_t>>(model.num_layers);
    for (int64_t i = 0; i < model.num_layers; i++) new (next + i) std::atomic<int64_t>(0);
    Run<E> run(model, step, buffers, next);
#pragma omp parallel num_threads(threads)
    run.run(Member{omp_get_thread_num(), omp_get_num_threads()});
}

template <class E, class O>
void run_product(const Weight &w, const E *x, size_t stride, size_t rows, O *out, int threads) {
    static thread_local Scratch words, numbers;
    const bool serves = Prepared::serves<E>(w);
    Prepared prepared{};
    if (serves)
        prepared = {words.get<int32_t>(rows * Prepared::stride(w)),
                    numbers.get<float>(rows * Prepared::count(w))};
#pragma omp parallel num_threads(threads)
    {
        Member member{omp_get_thread_num(), omp_get_num_threads()};
        if (serves) {
            prepare(member, w, x, stride, rows, prepared);
#pragma omp barrier
        }
        multiply(member, w, x, stride, prepared, rows, Target<E, O>{out, nullptr});
    }
}

template <class E> void run_attention(const Attention<E> &attention, int threads) {
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        attend(attention, next, scratch);
    }
}

// --- what Python calls ----------------------------------------------------------------------------

extern "C" {

// Floats of a vector: which form this is.
int64_t specinfer_lanes() { return LANES; }

// from [rows][stride] words -> to [rows / 32][words][32], zeros for missing rows
void specinfer_pack(const int32_t *from, int64_t stride, int64_t rows, int64_t words, int32_t *to,
                    int threads) {
    const size_t panels = (rows + WIDTH - 1) / WIDTH;
#pragma omp parallel for num_threads(threads)
    for (size_t i = 0; i < panels * VECTORS; i++)
        for (int64_t k = 0; k < words; k += LANES) {
            Words block[LANES];
            for (size_t j = 0; j < LANES; j++) {
                int64_t row = i * LANES + j;
                block[j] = row < rows ? load_words(from + row * stride + k, lanes(words - k))
                                      : broadcast(0);
            }
            transpose(block);
            int32_t *panel = to + (i / VECTORS * words + k) * WIDTH + i % VECTORS * LANES;
            for (int64_t j = 0; j < LANES && k + j < words; j++)
                store_line(panel + j * WIDTH, block[j]);
        }
}

// weight [groups][group_size] of 32, 64 or 128 -> values alike, scales [groups]
void specinfer_round_int4(const void *weight, int is_bfloat16, int64_t groups, int64_t group_size,
                          int8_t *values, float *scales, int threads) {
    using rounding::round_groups;
    if (is_bfloat16) {
        auto from = static_cast<const bfloat16 *>(weight);
        return round_groups(from, groups, group_size, values, scales, threads);
    }
    round_groups(static_cast<const float *>(weight), groups, group_size, values, scales, threads);
}

// Returns whether it was computed: not where a token is none of the vocabulary's.
int specinfer_step(const Model *model, const Step *step, int threads) {
    for (int64_t i = 0; i < step->num_tokens; i++)
        if (step->tokens[i] < 0 || step->tokens[i] >= model->head.outputs) return 0;
    if (model->is_bfloat16) {
        run_step<bfloat16>(*model, *step, threads);
        return 1;
    }
    run_step<float>(*model, *step, threads);
    return 1;
}

// x [rows][stride], elements -> out [rows][outputs] of x's type or float32
void specinfer_multiply(const Weight *w, const void *x, int64_t stride, int64_t rows, void *out,
                        int is_bfloat16, int out_is_bfloat16, int threads) {
    if (is_bfloat16) {
        auto from = static_cast<const bfloat16 *>(x);
        if (out_is_bfloat16)
            return run_product(*w, from, stride, rows, static_cast<bfloat16 *>(out), threads);
        return run_product(*w, from, stride, rows, static_cast<float *>(out), threads);
    }
    if (out_is_bfloat16)
        return run_product(*w, static_cast<const float *>(x), stride, rows,
                           static_cast<bfloat16 *>(out), threads);
    run_product(*w, static_cast<const float *>(x), stride, rows, static_cast<float *>(out), threads);
}

// q [tokens][heads][head_dim] -> out alike
void specinfer_attend(const Segment *segments, int64_t num_segments, const void *q,
                      const void *keys, const void *values, void *out, int64_t heads,
                      int64_t kv_heads, int64_t head_dim, int64_t slots, float scale,
                      int is_bfloat16, int threads) {
    auto run = [&](auto *zero) {
        using E = std::remove_pointer_t<decltype(zero)>;
        run_attention(
            Attention<E>{segments,
                         (size_t)num_segments,
                         (size_t)heads,
                         (size_t)kv_heads,
                         scale,
                         {static_cast<const E *>(keys), static_cast<const E *>(values),
                          (size_t)(slots * head_dim), (size_t)head_dim},
                         static_cast<const E *>(q),
                         (size_t)(heads * head_dim),
                         static_cast<E *>(out),
                         (size_t)(heads * head_dim)},
            threads);
    };
    if (is_bfloat16) return run(static_cast<bfloat16 *>(nullptr));
    run(static_cast<float *>(nullptr));
}

// [rows][size] laws, or logits and 1 / temperature where that is not 0 -> the likeliest tokens of
// each row and their probabilities, both [rows][width]
void specinfer_likeliest(const float *from, int64_t rows, int64_t size, int64_t width, float scale,
                         float *values, int64_t *places) {
    for (int64_t r = 0; r < rows; r++) {
        likeliest(from + r * size, size, width, values + r * width, places + r * width);
        if (scale != 0) normalise(from + r * size, size, scale, width, values + r * width);
    }
}

void specinfer_record(double *trials, double *hits, double *rates, int64_t rank,
                      double probability, double accepted, double most) {
    record(trials, hits, rates, rank, probability, accepted, most);
}

int64_t specinfer_choose(const double *reaches, const Curve *curves, int64_t count, double price,
                         const double *costs, int64_t num_costs, int64_t *order) {
    return choose(reaches, curves, count, price, costs, num_costs, order);
}

int64_t specinfer_pool_offered(void *pool, Offer *to) {
    return static_cast<Pool *>(pool)->offered(to);
}

// Grows on from round `first`; how many rounds there were, or -1 where a step could not be computed.
// expanded  in the order in which their keys stand; passes  one for each round
int64_t specinfer_grow(const Model *model, const Growing *growing, const Place *places,
                       int64_t first, const float *cos, const float *sin, int threads,
                       Offer *expanded, GrowingPass *passes) {
    static thread_local Scratch logits;
    Grower grower{*growing, places};
    Round round;
    int64_t num_rounds = 0;
    for (; grower.choose_offers(first + num_rounds); num_rounds++) {
        const double start = omp_get_wtime();
        grower.lay_out(round);
        const int64_t count = round.tokens.size(), vocab = model->head.outputs;
        const Segment *const plan = round.segments.data();
        float *to = logits.get<float>(count * vocab);
        Step step{count,
                  count,
                  (int64_t)round.segments.size(),
                  round.tokens.data(),
                  round.positions.data(),
                  round.writes.data(),
                  round.rows.data(),
                  cos,
                  sin,
                  &plan,
                  to,
                  nullptr};
        if (!specinfer_step(model, &step, threads)) return -1;
        grower.take(round, to, vocab);
        expanded = std::copy(grower.offers().begin(), grower.offers().end(), expanded);
        passes[num_rounds] = {count, step.num_segments, omp_get_wtime() - start};
    }
    return num_rounds;
}

void *specinfer_pool_new(const Request *requests, int64_t count) {
    return new Pool(requests, count);
}

void specinfer_pool_free(void *pool) { delete static_cast<Pool *>(pool); }

double specinfer_pool_price(void *pool, const double *nodes, int64_t count) {
    return static_cast<Pool *>(pool)->price(nodes, count);
}

void specinfer_pool_extend(void *pool, const int64_t *parents, int64_t count,
                           const int64_t *tokens, const float *probabilities, int64_t width,
                           int64_t source, const Curve *curves, double least) {
    static_cast<Pool *>(pool)->extend(parents, count, tokens, probabilities, width, source, curves,
                                      least);
}

void specinfer_pool_append(void *pool, const int64_t *parents, int64_t num_parents,
                           const Guess *guesses, int64_t count) {
    static_cast<Pool *>(pool)->append(parents, num_parents, guesses, count);
}

int64_t specinfer_pool_frontier(void *pool, int64_t num_rounds, double price, int is_priced,
                                Offer *to) {
    return static_cast<Pool *>(pool)->frontier(num_rounds, price, is_priced, to);
}

int64_t specinfer_pool_best(void *pool, const double *totals, int64_t num_totals, Guess *to) {
    return static_cast<Pool *>(pool)->best(totals, num_totals, to);
}
}

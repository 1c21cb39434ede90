// The rounds of growing picked trees that follow a drafter's first pass, in one call: the best
// guesses are expanded by the drafter's own step and its answers valued, until no pass is worth its
// time. What is decided is what draft/heap.py decides round by round.
#pragma once

#include <vector>

#include "attention.h"
#include "guesses.h"

// One request's place in the drafter's pages; all that is known of it is computed there.
struct Place {
    int64_t prefix;       // keys that every node sees
    const int64_t *slots; // [prefix + nodes] where keys stand; null: a run that begins at `start`
    int64_t start;
};

struct Growing {
    Pool *pool;
    const double *nodes; // [num_prices] of one more node; null: nothing has a price
    const double *costs; // [num_prices] of a pass over 0, 1, ... nodes
    int64_t num_prices;
    const Curve *curves; // by request
    int64_t num_requests, source, width;
    float scale;  // 1 / temperature
    double least; // value of a guess that is kept
};

struct GrowingPass {
    int64_t num_nodes, num_spans;
    double seconds;
};

// One request's nodes that are expanded, as columns of what its nodes see behind the prefix.
class Region {
  public:
    // A column for a node below another's, -1 for below the root.
    void add(int64_t above) { above_.push_back(above); }

    int64_t size() const { return above_.size(); }

    void see(int64_t column, uint8_t *mask) const {
        for (; column >= 0; column = above_[column]) mask[column] = 1;
    }

  private:
    std::vector<int64_t> above_;
};

// One round's tokens, as a step computes them.
struct Round {
    std::vector<int64_t> tokens, positions, writes, rows, parents;
    std::vector<Segment> segments;
    std::vector<std::vector<uint8_t>> masks;
    std::vector<Curve> curves;
};

class Grower {
  public:
    Grower(const Growing &growing, const Place *places)
        : g(growing), places_(places), regions_(growing.num_requests) {}

    // The offers whose expansion is worth a pass, request by request; false: there are none.
    bool choose_offers(int64_t num_rounds) {
        const bool is_priced = g.nodes != nullptr;
        const double price = is_priced ? g.pool->price(g.nodes, g.num_prices) : 0;
        offers_.resize(g.pool->most_offers());
        offers_.resize(g.pool->frontier(num_rounds, price, is_priced, offers_.data()));
        if (is_priced) {
            std::vector<double> reaches;
            std::vector<Curve> curves;
            for (const Offer &offer : offers_) {
                reaches.push_back(g.pool->worth_of(offer));
                curves.push_back(g.curves[offer.request]);
            }
            std::vector<int64_t> order(offers_.size());
            order.resize(offers_.empty() ? 0
                                         : choose(reaches.data(), curves.data(), offers_.size(),
                                                  price, g.costs, g.num_prices, order.data()));
            std::vector<Offer> chosen;
            for (int64_t index : order) chosen.push_back(offers_[index]);
            offers_ = chosen;
        }
        std::stable_sort(offers_.begin(), offers_.end(),
                         [](const Offer &a, const Offer &b) { return a.request < b.request; });
        return !offers_.empty();
    }

    // What the drafter computes for the chosen offers. Their keys stand behind the region's.
    void lay_out(Round &round) {
        round = Round();
        for (size_t i = 0; i < offers_.size();) {
            const int64_t request = offers_[i].request;
            size_t stop = i;
            while (stop < offers_.size() && offers_[stop].request == request) stop++;
            const Place &place = places_[request];
            Region &region = regions_[request];
            const int64_t old = region.size(), keys = old + (stop - i);
            std::vector<uint8_t> mask((stop - i) * keys, 0);
            for (size_t k = i; k < stop; k++) {
                const Offer &offer = offers_[k];
                const int64_t key = place.prefix + old + (k - i);
                columns_.resize(std::max<size_t>(columns_.size(), offer.row + 1), -1);
                region.add(columns_[g.pool->parent_of(offer.row)]);
                columns_[offer.row] = old + (k - i);
                region.see(columns_[offer.row], mask.data() + (k - i) * keys);
                round.tokens.push_back(offer.token);
                round.positions.push_back(place.prefix - 1 + offer.depth);
                round.writes.push_back(place.slots == nullptr ? place.start + key
                                                              : place.slots[key]);
                round.rows.push_back(round.rows.size());
                round.parents.push_back(offer.row);
                round.curves.push_back(g.curves[request]);
            }
            round.masks.push_back(std::move(mask));
            round.segments.push_back({(int64_t)(stop - i), place.prefix + keys, place.prefix,
                                      place.slots, place.start, round.masks.back().data(),
                                      nullptr});
            i = stop;
        }
    }

    // Puts what the drafter says after them into the pool.
    void take(const Round &round, const float *logits, int64_t vocab) {
        const int64_t count = round.tokens.size(), width = std::min(g.width, vocab);
        tokens_.resize(count * width);
        probabilities_.resize(count * width);
        for (int64_t r = 0; r < count; r++) {
            float *to = probabilities_.data() + r * width;
            likeliest(logits + r * vocab, vocab, width, to, tokens_.data() + r * width);
            normalise(logits + r * vocab, vocab, g.scale, width, to);
        }
        g.pool->extend(round.parents.data(), count, tokens_.data(), probabilities_.data(), width,
                       g.source, round.curves.data(), g.least);
    }

    const std::vector<Offer> &offers() const { return offers_; }

  private:
    const Growing &g;
    const Place *places_;
    std::vector<Region> regions_;  // by request
    std::vector<int64_t> columns_; // by row of the pool; -1: not expanded here
    std::vector<Offer> offers_;
    std::vector<int64_t> tokens_;
    std::vector<float> probabilities_;
};

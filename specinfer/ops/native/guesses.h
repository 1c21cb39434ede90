// The pool of guesses from which picked trees are grown: draft/guesses.py says what it is, and has the
// same in numpy. Sums and products are in the same order there; logarithms may differ in a last bit.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"

struct Guess {
    int64_t row, parent, request, token, depth, source, rank;
    int64_t node;        // in its request's draft; 0: it was never offered
    double value, share; // the chance that it is accepted; its share of what its drafter left
};

// A guess that may be expanded.
struct Offer {
    int64_t row, request, node, above, token, depth; // above: the node it hangs from
    double value;
};

struct Request {
    int64_t max_depth, max_nodes, max_rounds, rows; // rows: expanded in one round at most
    double urgency;
    int64_t num_nodes; // in its draft
};

// How often slots were accepted: counts by rank and knot, or null for a drafter's own word.
struct Curve {
    const double *rates, *trials; // [RANKS][KNOTS]
    double odds;                  // what a request's odds are multiplied by

    static constexpr int64_t RANKS = 8, KNOTS = 33;
    static constexpr double REACH = 8.0, STEP = 0.5;

    double favoured(double rate) const { return rate * odds / (1.0 - rate + rate * odds); }

    double at(int64_t rank, double probability) const {
        if (rates == nullptr) return probability;
        double p = std::max(std::min(probability, 1 - 1e-9), 1e-9);
        double axis = std::log(p / (1 - p)) / STEP + REACH / STEP;
        axis = std::max(std::min(axis, KNOTS - 1.0), 0.0);
        int64_t low = std::min((int64_t)axis, KNOTS - 2);
        const double *row = rates + std::min(rank, RANKS - 1) * KNOTS;
        return favoured(row[low] + (axis - low) * (row[low + 1] - row[low]));
    }

    // What expanding a node is expected to bring: its first slots' value above the price.
    double gain(double reach, double price) const {
        if (rates == nullptr) return std::max(0.0, reach - price);
        double sum = 0, all = 0;
        for (int64_t k = 0; k < KNOTS; k++) {
            sum += trials[k] * std::max(0.0, reach * favoured(rates[k]) - price);
            all += trials[k];
        }
        return sum / all;
    }
};

class Pool {
  public:
    Pool(const Request *requests, int64_t count) : requests_(requests, requests + count) {
        for (int64_t i = 0; i < count; i++) add({i, -1, i, 0, 0, 0, 0, 0, 1.0, 0.0});
    }

    // What one more node costs when the best guesses so far are taken.
    double price(const double *nodes, int64_t count) {
        worths_.clear();
        for (size_t i = requests_.size(); i < guesses_.size(); i++)
            worths_.push_back(worth(guesses_[i]));
        std::sort(worths_.begin(), worths_.end(), [](double a, double b) { return a > b; });
        int64_t taken = 0, most = std::min((int64_t)worths_.size(), count);
        while (taken < most && !(worths_[taken] < nodes[taken])) taken++;
        return nodes[std::min(taken, count - 1)];
    }

    // The best guesses of each request that are not expanded yet; how many.
    int64_t frontier(int64_t num_rounds, double price, bool is_priced, Offer *to) {
        order_.clear();
        for (const Guess &guess : guesses_) {
            const Request &request = requests_[guess.request];
            if (is_open_[guess.row] && guess.depth < request.max_depth &&
                num_rounds < request.max_rounds && (!is_priced || worth(guess) > price))
                order_.push_back(guess.row);
        }
        by_request();
        int64_t count = 0, places = 0, last = -1;
        for (int64_t row : order_) {
            Guess &guess = guesses_[row];
            Request &request = requests_[guess.request];
            if (guess.request != last) {
                last = guess.request;
                places = std::min(request.rows, request.max_nodes - request.num_nodes);
            }
            if (places-- <= 0) continue;
            if (guess.parent >= 0 && guess.node == 0) guess.node = ++request.num_nodes;
            int64_t above = guess.parent < 0 ? -1 : guesses_[guess.parent].node;
            to[count++] = {row,         guess.request, guess.node, above,
                           guess.token, guess.depth,   guess.value};
        }
        return count;
    }

    // Guesses of one drafter after expanded ones, likeliest first: [count][width].
    void extend(const int64_t *parents, int64_t count, const int64_t *tokens,
                const float *probabilities, int64_t width, int64_t source, const Curve *curves,
                double least) {
        for (int64_t i = 0; i < count; i++) {
            const Guess parent = guesses_[parents[i]];
            is_open_[parent.row] = false;
            double before = 0, missed = 1;
            for (int64_t j = 0; j < width; j++) {
                double probability = probabilities[i * width + j];
                if (!(probability > 0)) break; // what a law cannot draw, and all after it
                double share = probability / std::max(1.0 - before, probability);
                double rate = curves[i].at(j, share), value = parent.value * missed * rate;
                before += probability;
                missed *= 1.0 - rate;
                if (value > least)
                    add({0, parent.row, parent.request, tokens[i * width + j], parent.depth + 1,
                         source, j, 0, value, share});
            }
        }
    }

    // The same, valued already.
    void append(const int64_t *parents, int64_t num_parents, const Guess *guesses, int64_t count) {
        for (int64_t i = 0; i < num_parents; i++) is_open_[parents[i]] = false;
        for (int64_t i = 0; i < count; i++) add(guesses[i]);
    }

    // The best guesses, parents before children: each request's, and of all what is worth its
    // price; how many.
    // totals  [num_totals] what 0, 1, ... nodes cost together; null: nothing
    int64_t best(const double *totals, int64_t num_totals, Guess *to) {
        order_.clear();
        for (size_t i = requests_.size(); i < guesses_.size(); i++) order_.push_back(i);
        by_request();
        int64_t count = 0, places = 0, last = -1;
        for (int64_t row : order_) {
            if (guesses_[row].request != last) {
                last = guesses_[row].request;
                places = requests_[last].max_nodes;
            }
            if (places-- > 0) order_[count++] = row;
        }
        order_.resize(count);
        std::stable_sort(order_.begin(), order_.end(), [this](int64_t a, int64_t b) {
            return worth(guesses_[a]) > worth(guesses_[b]);
        });
        if (totals != nullptr) {
            double gain = 0, most = -totals[0];
            int64_t kept = 0;
            for (int64_t i = 0; i < std::min(count, num_totals - 1); i++) {
                gain += worth(guesses_[order_[i]]);
                if (gain - totals[i + 1] > most) most = gain - totals[i + 1], kept = i + 1;
            }
            order_.resize(kept);
        }
        for (int64_t row : order_) *to++ = guesses_[row];
        return order_.size();
    }

    // Every guess that was ever offered, by request and node; how many.
    int64_t offered(Offer *to) const {
        int64_t count = 0;
        for (const Guess &guess : guesses_)
            if (guess.node > 0)
                to[count++] = {guess.row,
                               guess.request,
                               guess.node,
                               guesses_[guess.parent].node,
                               guess.token,
                               guess.depth,
                               guess.value};
        std::sort(to, to + count, [](const Offer &a, const Offer &b) {
            return a.request != b.request ? a.request < b.request : a.node < b.node;
        });
        return count;
    }

    int64_t most_offers() const {
        int64_t most = 0;
        for (const Request &each : requests_) most += std::min(each.rows, each.max_nodes);
        return most;
    }

    int64_t parent_of(int64_t row) const { return guesses_[row].parent; }
    double worth_of(const Offer &offer) const { return worth(guesses_[offer.row]); }

  private:
    void add(Guess guess) {
        guess.row = guesses_.size();
        guesses_.push_back(guess);
        is_open_.push_back(true);
    }

    double worth(const Guess &guess) const { return guess.value * requests_[guess.request].urgency; }

    // Orders rows by request, the worthiest first, the older first among equals.
    void by_request() {
        std::stable_sort(order_.begin(), order_.end(), [this](int64_t a, int64_t b) {
            const Guess &x = guesses_[a], &y = guesses_[b];
            return x.request != y.request ? x.request < y.request : worth(x) > worth(y);
        });
    }

    std::vector<Request> requests_;
    std::vector<Guess> guesses_; // the roots first
    std::vector<bool> is_open_;  // not expanded yet
    std::vector<int64_t> order_;
    std::vector<double> worths_;
};

// Counts one slot among those at two knots, as Curves.record of draft/calibration.py does.
inline void record(double *trials, double *hits, double *rates, int64_t rank, double probability,
                   double accepted, double most) {
    double p = std::min(std::max(probability, 1e-9), 1 - 1e-9);
    double axis = std::log(p / (1 - p)) / Curve::STEP + Curve::REACH / Curve::STEP;
    axis = std::min(std::max(axis, 0.0), Curve::KNOTS - 1.0);
    int64_t low = std::min((int64_t)axis, Curve::KNOTS - 2);
    int64_t place = std::min(rank, Curve::RANKS - 1) * Curve::KNOTS + low;
    for (double share : {low + 1 - axis, axis - low}) {
        if (trials[place] > most) trials[place] /= 2, hits[place] /= 2;
        trials[place] += share;
        hits[place] += share * accepted;
        rates[place] = hits[place] / trials[place];
        place++;
    }
}

// Which of some nodes a drafter's pass is worth its time for, the best first; how many.
// costs  [num_costs] of a pass over 0, 1, ... nodes
inline int64_t choose(const double *reaches, const Curve *curves, int64_t count, double price,
                      const double *costs, int64_t num_costs, int64_t *order) {
    double most = 0; // if every guess were right
    for (int64_t i = 0; i < count; i++) most += std::max(0.0, reaches[i] - price);
    if (most <= costs[1]) return 0;
    std::vector<double> gains(count);
    for (int64_t i = 0; i < count; i++) {
        gains[i] = curves[i].gain(reaches[i], price);
        order[i] = i;
    }
    std::stable_sort(order, order + count,
                     [&](int64_t a, int64_t b) { return gains[a] > gains[b]; });
    int64_t best = 0;
    double gain = 0, worth = 0;
    for (int64_t i = 0; i < std::min(count, num_costs - 1); i++) {
        gain += gains[order[i]];
        if (gain - costs[i + 1] > worth) worth = gain - costs[i + 1], best = i + 1;
    }
    return best;
}

// Logits' values among the likeliest -> their probabilities at a temperature.
// values  [width], the largest first
inline void normalise(const float *logits, int64_t size, float scale, int64_t width,
                      float *values) {
    const float most = values[0];
    const Vector peak = splat(most), by = splat(scale);
    Vector sums = splat(0.0f);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sums = sums + exp((load(logits + i) - peak) * by);
    float sum = total(sums);
    for (; i < size; i++) sum += std::exp((logits[i] - most) * scale);
    for (int64_t k = 0; k < width; k++) values[k] = std::exp((values[k] - most) * scale) / sum;
}

// The `width` likeliest of `size` and where they stand, the first among equals first.
inline void likeliest(const float *from, int64_t size, int64_t width, float *values,
                      int64_t *places) {
    int64_t held = 0;
    for (int64_t start = 0; start < size; start += 64) {
        const int64_t stop = std::min(start + 64, size);
        if (held == width) { // most blocks hold nothing that enters
            const float least = values[width - 1];
            int enters = 0;
#pragma omp simd reduction(| : enters)
            for (int64_t i = start; i < stop; i++) enters |= from[i] > least;
            if (!enters) continue;
        }
        for (int64_t i = start; i < stop; i++) {
            if (held == width && !(from[i] > values[width - 1])) continue;
            int64_t at = held < width ? held++ : width - 1;
            for (; at > 0 && from[i] > values[at - 1]; at--) {
                values[at] = values[at - 1];
                places[at] = places[at - 1];
            }
            values[at] = from[i];
            places[at] = i;
        }
    }
}

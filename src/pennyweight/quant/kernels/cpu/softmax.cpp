// The softmax of logits and its cross-entropy's gradient, row by row, where the logits lie; the
// arithmetic is float32.

#include "exponential.h"
#include "stored.h"
#include "threads.h"

namespace pennyweight {
namespace {

constexpr int64_t kTogether = 64;  // vectors summed before their sum joins the others

struct Softmax {
    void *logits;
    const int64_t *wanted;  // a column of each row
    float *sums;  // of each row the largest logit, the sum of powers over it, and the wanted logit
    int64_t rows, columns;
    bool error;  // softmax less one at the wanted column is written over the logits
};

// The vector at a row's k-th number; past the row's end, -infinity.
template <Type type>
INLINE V ending(const Softmax &s, int64_t at, int64_t k) {
    if (k + width <= s.columns) return load<type>(s.logits, at + k);
    float lanes[width];
    for (int i = 0; i < width; ++i)
        lanes[i] = k + i < s.columns ? load_one<type>(s.logits, at + k + i) : -__builtin_inff();
    return Lanes::load(lanes);
}

template <Type type>
void softmax(void *given, int64_t row) {
    const Softmax &s = *static_cast<const Softmax *>(given);
    const int64_t at = row * s.columns, whole = s.columns / width * width;
    V most = ending<type>(s, at, 0), poison = Lanes::zero();
    for (int64_t k = 0; k < s.columns; k += width) most = larger(most, ending<type>(s, at, k));
    const float top = largest_of(most), chosen = load_one<type>(s.logits, at + s.wanted[row]);
    const V over = Lanes::all(top);
    float sum = 0.0f;
    for (int64_t k = 0; k < s.columns;) {
        V part = Lanes::zero();
        for (const int64_t stop = least(k + kTogether * width, s.columns); k < stop; k += width) {
            const V x = ending<type>(s, at, k);
            part = part + exponential(x - over);
            // `exponential` takes what is not a number for the least: it must show in the sum.
            if (k < whole) poison = poison + (x - x);
        }
        sum += sum_of(part);
    }
    for (int64_t k = whole; k < s.columns; ++k) sum += load_one<type>(s.logits, at + k) - load_one<type>(s.logits, at + k);
    sum += sum_of(poison);
    s.sums[3 * row] = top, s.sums[3 * row + 1] = sum, s.sums[3 * row + 2] = chosen;
    if (!s.error) return;
    const V share = Lanes::all(1.0f / sum);
    for (int64_t k = 0; k < s.columns; k += width) {
        const V error = exponential(ending<type>(s, at, k) - over) * share;
        if (k < whole) {
            store<type>(s.logits, at + k, error);
            continue;
        }
        for (int64_t i = k; i < s.columns; ++i) store_one<type>(s.logits, at + i, error[i - k]);
    }
    store_one<type>(s.logits, at + s.wanted[row], (exponential(Lanes::all(chosen) - over) * share)[0] - 1.0f);
}

}  // namespace
}  // namespace pennyweight

using namespace pennyweight;

EXPORTED(void, softmax)(const Softmax *given, Type type, int32_t threads) {
    share_out(given->rows, threads, OF_TYPE(softmax, type), const_cast<Softmax *>(given));
}

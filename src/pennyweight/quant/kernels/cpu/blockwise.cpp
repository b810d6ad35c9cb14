// Quantizing to 4-bit blocks and back, each in one pass over the weight. The values are those of
// `blockwise.py`, bit for bit; the tests hold the two together.

#include "threads.h"
#include "weight.h"

namespace pennyweight {
namespace {

constexpr int64_t kPiece = 1 << 16;  // elements of one piece of work; a whole number of blocks
constexpr float kSmallestScale = 1e-38f;

struct Quantize {
    const void *weight;
    Type type;
    int64_t count, block;
    const float *thresholds;
    const uint8_t *order;
    uint8_t *codes;
    float *scales;
};

template <Type type>
INLINE Lanes::V loaded(const void *weight, int64_t i) {
    if (type == Type::float32) return Lanes::load(static_cast<const float *>(weight) + i);
    return Lanes::load(static_cast<const uint16_t *>(weight) + i, type);
}

INLINE float element(const void *weight, int64_t i, Type type) {
    if (type == Type::float32) return static_cast<const float *>(weight)[i];
    const uint16_t half = static_cast<const uint16_t *>(weight)[i];
    return type == Type::float16 ? from_float16(half) : from_bfloat16(half);
}

// The bits of a magnitude order as the magnitude does, NaN above infinity.
template <Type type>
INLINE void quantize_block(const Quantize &q, const Lanes::Ranks &ranks, int64_t start) {
    constexpr int width = Lanes::width;
    Lanes::I most = Lanes::magnitude(loaded<type>(q.weight, start));
    for (int64_t i = width; i < q.block; i += width)
        most = Lanes::larger(most, Lanes::magnitude(loaded<type>(q.weight, start + i)));
    const float peak = float_of(Lanes::largest(most));
    q.scales[start / q.block] = peak;
    const auto factor = Lanes::all(1.0f / (peak > kSmallestScale ? peak : kSmallestScale));
    for (int64_t i = 0; i < q.block; i += 32) {
        Lanes::I found[32 / width];
        for (int j = 0; j < 32 / width; ++j) {
            const auto value = loaded<type>(q.weight, start + i + j * width);
            found[j] = Lanes::rank(Lanes::times(value, factor), ranks);
        }
        Lanes::pack(q.codes + (start + i) / 2, found, ranks);
    }
}

// The last, partial block is divided by its scale where whole ones are multiplied.
void quantize_tail(const Quantize &q, int64_t start) {
    uint32_t peak_bits = bits_of(kSmallestScale);
    for (int64_t i = start; i < q.count; ++i) {
        const uint32_t bits = bits_of(element(q.weight, i, q.type)) & 0x7fffffff;
        if (bits > peak_bits) peak_bits = bits;
    }
    const float peak = float_of(peak_bits);
    q.scales[start / q.block] = peak;
    for (int64_t i = start; i < q.count; ++i) {
        const float value = element(q.weight, i, q.type) / peak;
        int rank = 0;
        for (int t = 0; t < 15; ++t) rank += value > q.thresholds[t];
        const uint8_t code = q.order[rank];
        if (i % 2)
            q.codes[i / 2] |= code;
        else
            q.codes[i / 2] = static_cast<uint8_t>(code << 4);
    }
    // The unused half of the last byte holds what a zero would.
    if (q.count % 2) {
        int rank = 0;
        for (int t = 0; t < 15; ++t) rank += 0.0f > q.thresholds[t];
        q.codes[q.count / 2] |= q.order[rank];
    }
}

template <Type type>
void quantize_piece(void *given, int64_t piece) {
    const Quantize &q = *static_cast<const Quantize *>(given);
    const Lanes::Ranks ranks(q.thresholds, q.order);
    const int64_t whole = q.count - q.count % q.block;
    const int64_t stop = (piece + 1) * kPiece < whole ? (piece + 1) * kPiece : whole;
    for (int64_t i = piece * kPiece; i < stop; i += q.block) quantize_block<type>(q, ranks, i);
}

struct Dequantize {
    const Weight *weight;
    void *out;
    bool stream;
};

template <bool stream>
INLINE void write(float *to, const Lanes::Scaled &table, const uint8_t *codes) {
    Lanes::V values[kLookedUp];
    Lanes::look_up(values, table, codes);
#pragma GCC unroll 8
    for (int i = 0; i < kLookedUp; ++i)
        if (stream)
            Lanes::stream(to + i * width, values[i]);
        else
            Lanes::store(to + i * width, values[i]);
}

template <bool stream>
INLINE void write(uint16_t *to, const Lanes::Halves &table, const uint8_t *codes) {
    Lanes::write<stream>(to, table, codes);
}

INLINE void write_one(float *to, float value, Type) { *to = value; }

INLINE void write_one(uint16_t *to, float value, Type type) {
    *to = type == Type::float16 ? to_float16(value) : to_bfloat16(value);
}

// Elements start..start+count in 4 bits; they begin with a block. `w` is a copy, so that no store to
// `out` can be one to it.
template <bool stream, class T>
INLINE void fill_blocks(const Weight w, T *out, int64_t start, int64_t count) {
    const int64_t block = int64_t{1} << w.block_shift;
    const auto levels = Lanes::levels(w.levels);
    for (int64_t at = start; at < start + count; at += block) {
        const int64_t stop = least(at + block, start + count);
        const auto *codes = static_cast<const uint8_t *>(w.codes);
        const float scale = block_scale(w, at >> w.block_shift);
        int64_t i = at;
        if constexpr (sizeof(T) == 4) {
            const auto table = Lanes::scaled(levels, scale, Type::float32);
            for (; i + 32 <= stop; i += 32) write<stream>(out + i, table, codes + i / 2);
        } else {
            const auto table = Lanes::halves(levels, scale, w.value_type);
            for (; i + 32 <= stop; i += 32) write<stream>(out + i, table, codes + i / 2);
        }
        for (; i < stop; ++i) write_one(out + i, value_at(w, i), w.value_type);
    }
}

// Elements of one row in 8 bits.
template <bool stream, class T>
INLINE void fill_row(const Weight &w, T *out, int64_t start, int64_t count) {
    const int64_t whole = count / width;
    each_vector(w, start, count, [&](int64_t j, Lanes::V v) __attribute__((always_inline)) {
        T *to = out + start + j * width;
        if (j >= whole)
            for (int64_t i = j * width; i < count; ++i) write_one(out + start + i, value_at(w, start + i), w.value_type);
        else if constexpr (sizeof(T) == 4)
            stream ? Lanes::stream(to, v) : Lanes::store(to, v);
        else
            stream ? Lanes::stream(to, v, w.value_type) : Lanes::store(to, v, w.value_type);
    });
}

template <bool stream, class T>
void fill_piece(const Weight &w, void *out, int64_t start, int64_t count) {
    if (w.levels)
        fill_blocks<stream>(w, static_cast<T *>(out), start, count);
    else
        fill_row<stream>(w, static_cast<T *>(out), start, count);
    if (stream) Lanes::flush();
}

template <class T>
void fill(void *given, int64_t piece) {
    const Dequantize &d = *static_cast<const Dequantize *>(given);
    const Weight &w = *d.weight;
    const auto write = d.stream ? fill_piece<true, T> : fill_piece<false, T>;
    if (!w.levels) return write(w, d.out, piece * w.columns, w.columns);
    const int64_t count = w.rows * w.columns, start = piece * kPiece;
    write(w, d.out, start, count - start < kPiece ? count - start : kPiece);
}

}  // namespace
}  // namespace pennyweight

using namespace pennyweight;

// A block that holds a NaN or an infinity gets a scale that is not finite.
EXPORTED(void, quantize)(const void *weight, int32_t type, int64_t count, int64_t block,
                         const float *thresholds, const uint8_t *order, uint8_t *codes,
                         float *scales, int32_t threads) {
    const Type of = static_cast<Type>(type);
    Quantize q{weight, of, count, block, thresholds, order, codes, scales};
    const int64_t whole = count - count % block;
    const auto piece = of == Type::float32    ? quantize_piece<Type::float32>
                       : of == Type::bfloat16 ? quantize_piece<Type::bfloat16>
                                              : quantize_piece<Type::float16>;
    share_out((whole + kPiece - 1) / kPiece, threads, piece, &q);
    if (whole < count) quantize_tail(q, whole);
}

// Scales less their mean to bytes in groups, by a table of equal bins of [-1, 1].
EXPORTED(void, nest)(const float *scales, int64_t count, float offset, int64_t group,
                     const uint8_t *bins, int64_t bin_count, uint8_t *codes, float *group_scales) {
    const float last = static_cast<float>(bin_count - 1);
    for (int64_t start = 0; start < count; start += group) {
        const int64_t stop = start + group < count ? start + group : count;
        float peak = 0.0f;
        for (int64_t i = start; i < stop; ++i) {
            const float magnitude = __builtin_fabsf(scales[i] - offset);
            peak = magnitude > peak ? magnitude : peak;
        }
        group_scales[start / group] = peak;
        const float factor = 1.0f / peak;
        for (int64_t i = start; i < stop; ++i) {
            float value = (scales[i] - offset) * factor;
            value = value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value;
            // 0 * inf, in a group of zeros, is not a number and takes the lowest bin.
            const float position = (value + 1.0f) * 0.5f * last + 0.5f;
            codes[i] = bins[position == position ? static_cast<int64_t>(position) : 0];
        }
    }
}

// `stream` writes past the caches, for what is too large to be read again from them.
EXPORTED(void, dequantize)(const Weight *weight, void *out, bool stream, int32_t threads) {
    const int64_t count = weight->rows * weight->columns;
    // Past the caches go whole lines; in 8 bits a piece is a row, which may begin within one.
    const int64_t row_bytes = weight->columns * (weight->value_type == Type::float32 ? 4 : 2);
    const bool lines = reinterpret_cast<uintptr_t>(out) % 64 == 0 && (weight->levels || row_bytes % 64 == 0);
    const Dequantize d{weight, out, stream && lines};
    const int64_t pieces = weight->levels ? (count + kPiece - 1) / kPiece : weight->rows;
    const auto piece = weight->value_type == Type::float32 ? fill<float> : fill<uint16_t>;
    share_out(pieces, threads, piece, const_cast<Dequantize *>(&d));
}

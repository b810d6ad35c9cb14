// A stored weight as the kernels see it, and the one place where its codes become values.
#pragma once

#include "lanes.h"

namespace pennyweight {

// Row-major [rows, columns]. In 4 bits: two codes a byte, one scale for each 2^block_shift
// elements, plain (float32) or nested (a byte each, `group` of them with one float32 scale,
// all with one offset). In 8 bits: int8 codes and one float32 scale a row. Values themselves, of the
// products' type, may stand in the place of codes, without scales.
struct Weight {
    const void *codes;
    const void *scales;
    const float *group_scales;  // null where the scales are plain
    const float *offset;
    const float *dynamic;  // the 256 values of nested scales
    const float *levels;   // the 16 values of 4-bit codes; null: 8 bits
    int64_t rows, columns;
    int32_t block_shift;
    int32_t group_shift;  // -1: not a power of two
    uint32_t group;
    Type value_type;  // what each value is rounded to
};

namespace {

INLINE float block_scale(const Weight &w, int64_t block) {
    if (!w.group_scales) return static_cast<const float *>(w.scales)[block];
    const uint8_t code = static_cast<const uint8_t *>(w.scales)[block];
    const int64_t group = w.group_shift >= 0 ? block >> w.group_shift : block / w.group;
    const float product = w.dynamic[code] * w.group_scales[group];
    return product + *w.offset;
}

INLINE float rounded(float value, Type type) {
    if (type == Type::bfloat16) return from_bfloat16(to_bfloat16(value));
    if (type == Type::float16) return from_float16(to_float16(value));
    return value;
}

// Whether the values themselves, in float32, stand in the place of codes.
INLINE bool plain(const Weight &w) { return !w.levels && !w.scales; }

inline float value_at(const Weight &w, int64_t i) {
    if (plain(w)) return static_cast<const float *>(w.codes)[i];
    if (!w.levels) {
        const float scale = static_cast<const float *>(w.scales)[i / w.columns];
        return rounded(static_cast<const int8_t *>(w.codes)[i] * scale * (1.0f / 127.0f), w.value_type);
    }
    const uint8_t byte = static_cast<const uint8_t *>(w.codes)[i >> 1];
    const float level = w.levels[i & 1 ? byte & 15 : byte >> 4];
    return rounded(level * block_scale(w, i >> w.block_shift), w.value_type);
}

constexpr int kLookedUp = 32 / width;  // vectors of the codes that are looked up at once

// Hands the `count` values from element `start` on to `sink(j, vector j)`, zeros after the last.
// All of 8-bit values lie in one row. The levels are scaled once a block: a code then is a value.
template <Type type, class Sink>
INLINE void each_vector(const Weight &w, int64_t start, int64_t count, const Sink &sink) {
    constexpr int width = Lanes::width;
    int64_t j = 0;
    const int64_t whole = count / width;
    if (plain(w)) {
        const auto *values = static_cast<const float *>(w.codes) + start;
        for (; j < whole; ++j) sink(j, Lanes::load(values + j * width));
    } else if (!w.levels) {
        const auto *codes = static_cast<const int8_t *>(w.codes) + start;
        const auto scale = Lanes::all(static_cast<const float *>(w.scales)[start / w.columns]);
        const auto unit = Lanes::all(1.0f / 127.0f);
        for (; j < whole; ++j) {
            const auto scaled = Lanes::times(Lanes::load_int8(codes + j * width), scale);
            sink(j, Lanes::rounded(Lanes::times(scaled, unit), type));
        }
    } else if (start % width == 0) {
        const auto *codes = static_cast<const uint8_t *>(w.codes) + start / 2;
        const auto levels = Lanes::levels(w.levels);
        const int64_t block = int64_t{1} << w.block_shift;
        while (j < whole) {
            const int64_t at = start + j * width;
            const int64_t left = (block - (at & (block - 1))) / width;
            const int64_t stop = left < whole - j ? j + left : whole;
            const auto scaled = Lanes::scaled(levels, block_scale(w, at >> w.block_shift), type);
            Lanes::V values[kLookedUp];
            for (; j + kLookedUp <= stop; j += kLookedUp) {
                Lanes::look_up(values, scaled, codes + j * (width / 2));
#pragma GCC unroll 8
                for (int i = 0; i < kLookedUp; ++i) sink(j + i, values[i]);
            }
            if (j == stop) continue;
            uint8_t last[16] = {};
            memcpy(last, codes + j * width / 2, static_cast<size_t>((stop - j) * width / 2));
            Lanes::look_up(values, scaled, last);
            for (int i = 0; j < stop; ++i, ++j) sink(j, values[i]);
        }
    }
    for (; j * width < count; ++j) {
        float values[width] = {};
        const int64_t left = count - j * width < width ? count - j * width : width;
        for (int64_t i = 0; i < left; ++i) values[i] = value_at(w, start + j * width + i);
        sink(j, Lanes::load(values));
    }
}

template <class Sink>
INLINE void each_vector(const Weight &w, int64_t start, int64_t count, const Sink &sink) {
    switch (w.value_type) {
        case Type::float32: return each_vector<Type::float32>(w, start, count, sink);
        case Type::bfloat16: return each_vector<Type::bfloat16>(w, start, count, sink);
        case Type::float16: return each_vector<Type::float16>(w, start, count, sink);
    }
}

}  // namespace
}  // namespace pennyweight

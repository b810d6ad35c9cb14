// Numbers in memory, of a type that is the template's, as vectors of float32 and one by one.
#pragma once

#include "lanes.h"

// A function template of the type that a call names.
#define OF_TYPE(name, type)                                                  \
    (type == Type::float32    ? name<Type::float32>                          \
     : type == Type::bfloat16 ? name<Type::bfloat16>                         \
                              : name<Type::float16>)

namespace pennyweight {
namespace {

template <Type type>
INLINE Lanes::V load(const void *from, int64_t at) {
    if constexpr (type == Type::float32)
        return Lanes::load(static_cast<const float *>(from) + at);
    else
        return Lanes::load(static_cast<const uint16_t *>(from) + at, type);
}

template <Type type>
INLINE void store(void *to, int64_t at, Lanes::V v) {
    if constexpr (type == Type::float32)
        Lanes::store(static_cast<float *>(to) + at, v);
    else
        Lanes::store(static_cast<uint16_t *>(to) + at, Lanes::rounded(v, type), type);
}

template <Type type>
INLINE float load_one(const void *from, int64_t at) {
    if constexpr (type == Type::float32) return static_cast<const float *>(from)[at];
    const uint16_t half = static_cast<const uint16_t *>(from)[at];
    return type == Type::bfloat16 ? from_bfloat16(half) : from_float16(half);
}

template <Type type>
INLINE void store_one(void *to, int64_t at, float value) {
    if constexpr (type == Type::float32)
        static_cast<float *>(to)[at] = value;
    else
        static_cast<uint16_t *>(to)[at] = type == Type::bfloat16 ? to_bfloat16(value) : to_float16(value);
}

INLINE float sum_of(Lanes::V v) {
    float lanes[width], sum = 0.0f;
    Lanes::store(lanes, v);
    for (int i = 0; i < width; ++i) sum += lanes[i];
    return sum;
}

INLINE float largest_of(Lanes::V v) {
    float lanes[width];
    Lanes::store(lanes, v);
    for (int i = 1; i < width; ++i) lanes[0] = lanes[0] > lanes[i] ? lanes[0] : lanes[i];
    return lanes[0];
}

}  // namespace
}  // namespace pennyweight

// The vector operations that the kernels are written in, for the instruction set this file is
// compiled for: AVX-512, AVX2 with FMA and F16C, NEON, or plain C++ (PENNYWEIGHT_PLAIN).
//
// Products and sums are rounded apart, as pure torch rounds them (the build sets
// -ffp-contract=off), save where `fused` is asked for.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(PENNYWEIGHT_PLAIN)
#elif defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

// A function of the library, under the name of the variant it is compiled as.
#define PENNYWEIGHT_NAME_(variant, name) pennyweight_##variant##_##name
#define PENNYWEIGHT_NAME(variant, name) PENNYWEIGHT_NAME_(variant, name)
#define EXPORTED(type, name)                                    \
    extern "C" __attribute__((visibility("default"))) type PENNYWEIGHT_NAME(PENNYWEIGHT_VARIANT, name)

namespace pennyweight {

enum class Type : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

namespace {

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float from_bfloat16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

// Of finite numbers, to nearest, ties to even; too large ones become infinite.
INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float from_float16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t rest = half & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
    // Shifted into place the exponent lacks 112; a product by 2^112 adds it, subnormals too.
    return float_of(sign | bits_of(float_of(rest << 13) * float_of(0x77800000)));
}

INLINE uint16_t to_float16(float value) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
    if (rest >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
    if (rest < 0x38800000) {
        // The sum with 0.5 rounds to a whole number of the smallest subnormal, 2^-24.
        return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
    }
    const uint32_t rounded = rest + 0xfff + ((rest >> 13) & 1) - 0x38000000;
    return static_cast<uint16_t>(sign | (rounded >> 13));
}

#if defined(__AVX512F__) && !defined(PENNYWEIGHT_PLAIN)

struct Lanes {
    using V = __m512;
    using I = __m512i;
    using Levels = __m512;
    static constexpr int width = 16, forward_rows = 6, backward_rows = 12;

    static INLINE V zero() { return _mm512_setzero_ps(); }
    static INLINE V all(float value) { return _mm512_set1_ps(value); }
    static INLINE V load(const float *from) { return _mm512_loadu_ps(from); }
    static INLINE void store(float *to, V v) { _mm512_storeu_ps(to, v); }
    static INLINE void stream(float *to, V v) { _mm512_stream_ps(to, v); }
    static INLINE V times(V a, V b) { return _mm512_mul_ps(a, b); }
    static INLINE V plus(V a, V b) { return _mm512_add_ps(a, b); }
    static INLINE V fused(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static INLINE V load(const uint16_t *from, Type type) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
        if (type == Type::float16) return _mm512_cvtph_ps(half);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static INLINE V load_int8(const int8_t *from) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    static INLINE V rounded(V v, Type type) {
        if (type == Type::float32) return v;
        if (type == Type::float16)
            return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        const I bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
        const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
        const I up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(-0x10000)));
    }
    // `v` is already rounded to `type`.
    static INLINE __m256i narrow(V v, Type type) {
        if (type == Type::float16) return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16));
    }
    static INLINE void store(uint16_t *to, V v, Type type) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), narrow(v, type));
    }
    static INLINE void stream(uint16_t *to, V v, Type type) {
        _mm256_stream_si256(reinterpret_cast<__m256i *>(to), narrow(v, type));
    }
    static INLINE void flush() { _mm_sfence(); }

    static INLINE Levels levels(const float *table) { return load(table); }
    static INLINE Levels scaled(Levels levels, float scale, Type type) {
        return rounded(times(levels, all(scale)), type);
    }
    static INLINE V look_up(Levels levels, I codes) { return _mm512_permutexvar_ps(codes, levels); }
    // 16 codes of 8 bytes, the high half of a byte first; bits above a code are left as they are.
    static INLINE I codes(const uint8_t *from) {
        int32_t low, high;
        memcpy(&low, from, 4);
        memcpy(&high, from + 4, 4);
        const I both = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
        const I shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
        return _mm512_srlv_epi32(both, shifts);
    }

    static INLINE I magnitude(V v) {
        return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    }
    static INLINE I larger(I a, I b) { return _mm512_max_epi32(a, b); }
    static INLINE uint32_t largest(I v) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(v)); }
    // Thresholds as a search tree: the middle one, and what follows it in steps of 4, 2 and 1.
    struct Ranks {
        V eighth, fourth, second, first;
        I order;
        INLINE Ranks(const float *thresholds, const uint8_t *order_of_ranks) {
            float shifted[16 + 3];
            int32_t ordered[16];
            for (int i = 0; i < 19; ++i) shifted[i] = i < 15 ? thresholds[i] : __builtin_inff();
            for (int i = 0; i < 16; ++i) ordered[i] = order_of_ranks[i];
            eighth = all(thresholds[7]);
            fourth = load(shifted + 3);
            second = load(shifted + 1);
            first = load(shifted);
            order = _mm512_loadu_si512(ordered);
        }
    };
    static INLINE I code(V v, const Ranks &ranks) {
        I rank = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(v, ranks.eighth, _CMP_GT_OQ), 8);
        rank = deeper(v, rank, ranks.fourth, 4);
        rank = deeper(v, rank, ranks.second, 2);
        rank = deeper(v, rank, ranks.first, 1);
        return _mm512_permutexvar_epi32(rank, ranks.order);
    }
    static INLINE I deeper(V v, I rank, V thresholds, int step) {
        const V middle = _mm512_permutexvar_ps(rank, thresholds);
        const __mmask16 above = _mm512_cmp_ps_mask(v, middle, _CMP_GT_OQ);
        return _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
    }
    // 32 codes to 16 bytes.
    static INLINE void pack(uint8_t *to, const I *codes) {
        for (int i = 0; i < 2; ++i) {
            const I first = _mm512_slli_epi64(codes[i], 4), second = _mm512_srli_epi64(codes[i], 32);
            const __m128i bytes = _mm512_cvtepi64_epi8(_mm512_or_si512(first, second));
            _mm_storel_epi64(reinterpret_cast<__m128i *>(to + 8 * i), bytes);
        }
    }
    // The sums over the lanes of four vectors.
    static INLINE void sums(float *to, V a, V b, V c, V d) {
        const V ab = plus(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const V cd = plus(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        const V all_four = plus(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
        const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all_four), 1));
        const __m256 folded = _mm256_add_ps(_mm512_castps512_ps256(all_four), upper);
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(folded), _mm256_extractf128_ps(folded, 1)));
    }
};

#elif defined(__AVX2__) && !defined(PENNYWEIGHT_PLAIN)

struct Lanes {
    using V = __m256;
    using I = __m256i;
    struct Levels {
        V low, high;
    };
    static constexpr int width = 8, forward_rows = 3, backward_rows = 6;

    static INLINE V zero() { return _mm256_setzero_ps(); }
    static INLINE V all(float value) { return _mm256_set1_ps(value); }
    static INLINE V load(const float *from) { return _mm256_loadu_ps(from); }
    static INLINE void store(float *to, V v) { _mm256_storeu_ps(to, v); }
    static INLINE void stream(float *to, V v) { _mm256_stream_ps(to, v); }
    static INLINE V times(V a, V b) { return _mm256_mul_ps(a, b); }
    static INLINE V plus(V a, V b) { return _mm256_add_ps(a, b); }
    static INLINE V fused(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static INLINE V load(const uint16_t *from, Type type) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
        if (type == Type::float16) return _mm256_cvtph_ps(half);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static INLINE V load_int8(const int8_t *from) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    static INLINE V rounded(V v, Type type) {
        if (type == Type::float32) return v;
        if (type == Type::float16)
            return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        const I bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
        const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
        const I up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(-0x10000)));
    }
    // `v` is already rounded to `type`.
    static INLINE __m128i narrow(V v, Type type) {
        if (type == Type::float16) return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
        const I upper = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
        return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    }
    static INLINE void store(uint16_t *to, V v, Type type) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to), narrow(v, type));
    }
    static INLINE void stream(uint16_t *to, V v, Type type) {
        _mm_stream_si128(reinterpret_cast<__m128i *>(to), narrow(v, type));
    }
    static INLINE void flush() { _mm_sfence(); }

    static INLINE Levels levels(const float *table) { return {load(table), load(table + 8)}; }
    static INLINE Levels scaled(Levels levels, float scale, Type type) {
        const V factor = all(scale);
        return {rounded(times(levels.low, factor), type), rounded(times(levels.high, factor), type)};
    }
    static INLINE V look_up(Levels levels, I codes) {
        const V low = _mm256_permutevar8x32_ps(levels.low, codes);
        const V high = _mm256_permutevar8x32_ps(levels.high, codes);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    }
    // 8 codes of 4 bytes, the high half of a byte first; bits above a code are left as they are.
    static INLINE I codes(const uint8_t *from) {
        int32_t bytes;
        memcpy(&bytes, from, 4);
        const I shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
        return _mm256_srlv_epi32(_mm256_set1_epi32(bytes), shifts);
    }

    static INLINE I magnitude(V v) {
        return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
    }
    static INLINE I larger(I a, I b) { return _mm256_max_epi32(a, b); }
    static INLINE uint32_t largest(I v) {
        __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
    }
    // Thresholds as a search tree: the middle one, and on either side of it what follows in steps
    // of 4, 2 and 1.
    struct Ranks {
        V eighth;
        Levels fourth, second, first, order;
        INLINE Ranks(const float *thresholds, const uint8_t *order_of_ranks) {
            float shifted[16 + 3];
            int32_t ordered[16];
            for (int i = 0; i < 19; ++i) shifted[i] = i < 15 ? thresholds[i] : __builtin_inff();
            for (int i = 0; i < 16; ++i) ordered[i] = order_of_ranks[i];
            eighth = all(thresholds[7]);
            fourth = levels(shifted + 3);
            second = levels(shifted + 1);
            first = levels(shifted);
            order = levels(reinterpret_cast<const float *>(ordered));
        }
    };
    static INLINE I code(V v, const Ranks &ranks) {
        const V upper = _mm256_cmp_ps(v, ranks.eighth, _CMP_GT_OQ);
        I rank = _mm256_setzero_si256();
        rank = deeper(v, rank, upper, ranks.fourth, 4);
        rank = deeper(v, rank, upper, ranks.second, 2);
        rank = deeper(v, rank, upper, ranks.first, 1);
        return _mm256_castps_si256(half_chosen(ranks.order, rank, upper));
    }
    static INLINE V half_chosen(Levels table, I index, V upper) {
        const V low = _mm256_permutevar8x32_ps(table.low, index);
        return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(table.high, index), upper);
    }
    static INLINE I deeper(V v, I rank, V upper, Levels thresholds, int step) {
        const V above = _mm256_cmp_ps(v, half_chosen(thresholds, rank, upper), _CMP_GT_OQ);
        return _mm256_add_epi32(
            rank, _mm256_and_si256(_mm256_castps_si256(above), _mm256_set1_epi32(step)));
    }
    // 32 codes to 16 bytes.
    static INLINE void pack(uint8_t *to, const I *codes) {
        // Within each half of a register: four codes of each of the four vectors.
        const I bytes = _mm256_packus_epi16(_mm256_packs_epi32(codes[0], codes[1]),
                                            _mm256_packs_epi32(codes[2], codes[3]));
        const I pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
        const I packed = _mm256_packus_epi16(pairs, pairs);
        const __m128i in_order = _mm_unpacklo_epi16(_mm256_castsi256_si128(packed),
                                                    _mm256_extracti128_si256(packed, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to), in_order);
    }
    // The sums over the lanes of four vectors.
    static INLINE void sums(float *to, V a, V b, V c, V d) {
        const V all_four = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all_four),
                                     _mm256_extractf128_ps(all_four, 1)));
    }
};

#else

// Vectors of four, by the compiler's own vector types; on ARM with NEON's fused product and tables.
struct Lanes {
    typedef float V __attribute__((vector_size(16)));
    typedef int32_t I __attribute__((vector_size(16)));
    static constexpr int width = 4;
#if defined(__ARM_NEON) && !defined(PENNYWEIGHT_PLAIN)
    static constexpr int forward_rows = 4, backward_rows = 8;
    using Levels = uint8x16x4_t;
#else
    static constexpr int forward_rows = 2, backward_rows = 4;
    struct Levels {
        float value[16];
    };
#endif

    static INLINE V zero() { return V{0, 0, 0, 0}; }
    static INLINE V all(float value) { return V{value, value, value, value}; }
    static INLINE V load(const float *from) {
        V v;
        memcpy(&v, from, 16);
        return v;
    }
    static INLINE void store(float *to, V v) { memcpy(to, &v, 16); }
    static INLINE void stream(float *to, V v) { store(to, v); }
    static INLINE V times(V a, V b) { return a * b; }
    static INLINE V plus(V a, V b) { return a + b; }
    static INLINE V load(const uint16_t *from, Type type) {
        V v;
        for (int i = 0; i < 4; ++i)
            v[i] = type == Type::float16 ? from_float16(from[i]) : from_bfloat16(from[i]);
        return v;
    }
    static INLINE V load_int8(const int8_t *from) {
        return V{float(from[0]), float(from[1]), float(from[2]), float(from[3])};
    }
    static INLINE V rounded(V v, Type type) {
        if (type == Type::float32) return v;
        for (int i = 0; i < 4; ++i)
            v[i] = type == Type::float16 ? from_float16(to_float16(v[i]))
                                         : from_bfloat16(to_bfloat16(v[i]));
        return v;
    }
    static INLINE void store(uint16_t *to, V v, Type type) {
        for (int i = 0; i < 4; ++i)
            to[i] = type == Type::float16 ? to_float16(v[i]) : to_bfloat16(v[i]);
    }
    static INLINE void stream(uint16_t *to, V v, Type type) { store(to, v, type); }
    static INLINE void flush() {}

#if defined(__ARM_NEON) && !defined(PENNYWEIGHT_PLAIN)
    static INLINE V fused(V a, V b, V c) {
        return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    }
    static INLINE Levels levels(const float *table) {
        Levels bytes;
        for (int i = 0; i < 4; ++i) bytes.val[i] = vreinterpretq_u8_f32(vld1q_f32(table + 4 * i));
        return bytes;
    }
    static INLINE Levels scaled(Levels levels, float scale, Type type) {
        for (int i = 0; i < 4; ++i) {
            const V value = (V)vreinterpretq_f32_u8(levels.val[i]) * all(scale);
            levels.val[i] = vreinterpretq_u8_f32((float32x4_t)rounded(value, type));
        }
        return levels;
    }
    static INLINE V look_up(Levels levels, I codes) {
        const uint32x4_t index = vandq_u32((uint32x4_t)codes, vdupq_n_u32(15));
        const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), index, 0x04040404);
        return (V)vreinterpretq_f32_u8(vqtbl4q_u8(levels, vreinterpretq_u8_u32(bytes)));
    }
#else
    static INLINE V fused(V a, V b, V c) { return a * b + c; }
    static INLINE Levels levels(const float *table) {
        Levels copied;
        memcpy(copied.value, table, sizeof copied.value);
        return copied;
    }
    static INLINE Levels scaled(const Levels &levels, float scale, Type type) {
        Levels product;
        for (int i = 0; i < 16; i += 4)
            store(product.value + i, rounded(load(levels.value + i) * all(scale), type));
        return product;
    }
    static INLINE V look_up(const Levels &levels, I codes) {
        const float *value = levels.value;
        return V{value[codes[0] & 15], value[codes[1] & 15], value[codes[2] & 15],
                 value[codes[3] & 15]};
    }
#endif
    static INLINE I codes(const uint8_t *from) {
        return I{from[0] >> 4, from[0] & 15, from[1] >> 4, from[1] & 15};
    }

    static INLINE I magnitude(V v) { return (I)v & 0x7fffffff; }
    static INLINE I larger(I a, I b) {
        const I less = a < b;
        return (b & less) | (a & ~less);
    }
    static INLINE uint32_t largest(I v) {
        int32_t found = v[0];
        for (int i = 1; i < 4; ++i) found = v[i] > found ? v[i] : found;
        return static_cast<uint32_t>(found);
    }
    struct Ranks {
        const float *thresholds;
        const uint8_t *order;
        INLINE Ranks(const float *thresholds, const uint8_t *order)
            : thresholds(thresholds), order(order) {}
    };
    static INLINE I code(V v, const Ranks &ranks) {
        I rank = {0, 0, 0, 0};
        for (int i = 0; i < 15; ++i) rank -= (I)(v > all(ranks.thresholds[i]));
        for (int i = 0; i < 4; ++i) rank[i] = ranks.order[rank[i]];
        return rank;
    }
    static INLINE void pack(uint8_t *to, const I *codes) {
        for (int i = 0; i < 8; ++i) {
            to[2 * i] = static_cast<uint8_t>(codes[i][0] << 4 | codes[i][1]);
            to[2 * i + 1] = static_cast<uint8_t>(codes[i][2] << 4 | codes[i][3]);
        }
    }
    static INLINE void sums(float *to, V a, V b, V c, V d) {
        const V *of[4] = {&a, &b, &c, &d};
        for (int i = 0; i < 4; ++i) to[i] = ((*of[i])[0] + (*of[i])[1]) + ((*of[i])[2] + (*of[i])[3]);
    }
};

#endif

constexpr int width = Lanes::width;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace pennyweight

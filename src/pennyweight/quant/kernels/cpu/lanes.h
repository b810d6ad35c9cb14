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
#define KERNEL(name) PENNYWEIGHT_NAME(PENNYWEIGHT_VARIANT, name)
#define EXPORTED(type, name)                                    \
    extern "C" __attribute__((visibility("default"))) type KERNEL(name)

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
    using Levels = V;
    using Scaled = V;
    using Halves = I;
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
    static INLINE Scaled scaled(Levels levels, float scale, Type type) {
        return rounded(times(levels, all(scale)), type);
    }
    static INLINE void look_up(V *to, Scaled scaled, const uint8_t *codes) {
        const I shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            int32_t low, high;
            memcpy(&low, codes + 8 * i, 4);
            memcpy(&high, codes + 8 * i + 4, 4);
            const I both = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
            to[i] = _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shifts), scaled);
        }
    }
    // The table stands there twice: of each index only the low four bits count.
    static INLINE Halves halves(Levels levels, float scale, Type type) {
        return _mm512_broadcast_i64x4(narrow(scaled(levels, scale, type), type));
    }
    static INLINE I look_up(Halves table, const uint8_t *codes) {
        const I bytes =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)));
        const I both = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        return _mm512_permutexvar_epi16(both, table);
    }
    template <bool past_caches>
    static INLINE void write(uint16_t *to, Halves table, const uint8_t *codes) {
        if (past_caches)
            _mm512_stream_si512(reinterpret_cast<I *>(to), look_up(table, codes));
        else
            _mm512_storeu_si512(to, look_up(table, codes));
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
    static INLINE I rank(V v, const Ranks &ranks) {
        I rank = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(v, ranks.eighth, _CMP_GT_OQ), 8);
        rank = deeper(v, rank, ranks.fourth, 4);
        rank = deeper(v, rank, ranks.second, 2);
        return deeper(v, rank, ranks.first, 1);
    }
    static INLINE I deeper(V v, I rank, V thresholds, int step) {
        const V middle = _mm512_permutexvar_ps(rank, thresholds);
        const __mmask16 above = _mm512_cmp_ps_mask(v, middle, _CMP_GT_OQ);
        return _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
    }
    // The codes of 32 ranks to 16 bytes.
    static INLINE void pack(uint8_t *to, const I *found, const Ranks &ranks) {
        for (int i = 0; i < 2; ++i) {
            const I codes = _mm512_permutexvar_epi32(found[i], ranks.order);
            const I first = _mm512_slli_epi64(codes, 4), second = _mm512_srli_epi64(codes, 32);
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
    // Of the 16 levels: 0 to 3 and 8 to 11, and the rest.
    struct Levels {
        V even, odd;
    };
    // Byte i of the 16 values, in either half of a register: shuffles of bytes look up 32 codes at
    // once, where those of floats take eight, out of half of the table.
    struct Scaled {
        I byte[4];
    };
    struct Halves {
        I byte[2];
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

    static INLINE Levels levels(const float *table) {
        const V low = load(table), high = load(table + 8);
        return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
    }
    // The bytes 0 and 1 of all values, or 2 and 3, from 32 bits of each.
    template <bool upper>
    static INLINE void apart(I even, I odd, I *byte) {
        const I order = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        even = _mm256_shuffle_epi8(even, order), odd = _mm256_shuffle_epi8(odd, order);
        const I both = upper ? _mm256_unpackhi_epi32(even, odd) : _mm256_unpacklo_epi32(even, odd);
        byte[0] = _mm256_permute4x64_epi64(both, 0x88);
        byte[1] = _mm256_permute4x64_epi64(both, 0xdd);
    }
    static INLINE Scaled scaled(Levels levels, float scale, Type type) {
        const I even = _mm256_castps_si256(rounded(times(levels.even, all(scale)), type));
        const I odd = _mm256_castps_si256(rounded(times(levels.odd, all(scale)), type));
        Scaled found;
        apart<false>(even, odd, found.byte);
        apart<true>(even, odd, found.byte + 2);
        return found;
    }
    static INLINE Halves halves(Levels levels, float scale, Type type) {
        Halves found;
        apart<true>(half_bits(times(levels.even, all(scale)), type),
                    half_bits(times(levels.odd, all(scale)), type), found.byte);
        return found;
    }
    // The upper 16 bits of 32 are the number rounded to `type`.
    static INLINE I half_bits(V v, Type type) {
        if (type == Type::bfloat16) return _mm256_castps_si256(rounded(v, type));
        return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)), 16);
    }
    // The codes of 16 bytes, the high half of a byte first: of the first eight and of the others.
    static INLINE I codes(__m128i bytes) {
        const __m128i code = _mm_set1_epi8(15);
        const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), code), second = _mm_and_si128(bytes, code);
        return _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
    }
    static INLINE __m128i sixteen(const uint8_t *from) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    }
    // Unpacking works in the halves of a register, so bytes are brought where it leaves values in order.
    static INLINE void look_up(V *to, const Scaled &scaled, const uint8_t *from) {
        const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        const I index = codes(_mm_shuffle_epi8(sixteen(from), order));
        I of[4];
        for (int i = 0; i < 4; ++i) of[i] = _mm256_shuffle_epi8(scaled.byte[i], index);
        const I low = _mm256_unpacklo_epi8(of[0], of[1]), high = _mm256_unpacklo_epi8(of[2], of[3]);
        const I later_low = _mm256_unpackhi_epi8(of[0], of[1]), later_high = _mm256_unpackhi_epi8(of[2], of[3]);
        to[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high));
        to[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high));
        to[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(later_low, later_high));
        to[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(later_low, later_high));
    }
    template <bool past_caches>
    static INLINE void write(uint16_t *to, const Halves &table, const uint8_t *from) {
        const I index = codes(_mm_shuffle_epi32(sixteen(from), 0xd8));
        const I low = _mm256_shuffle_epi8(table.byte[0], index), high = _mm256_shuffle_epi8(table.byte[1], index);
        const I values[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
        for (int i = 0; i < 2; ++i)
            if (past_caches)
                _mm256_stream_si256(reinterpret_cast<I *>(to) + i, values[i]);
            else
                _mm256_storeu_si256(reinterpret_cast<I *>(to) + i, values[i]);
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
    // of 4, 2 and 1. A comparison gives -1 where it holds, so ranks are counted downwards, and two
    // bits of such a count choose among four: the first, the last, the third, the second.
    struct Ranks {
        V eighth, fourth[2], second, first[2];
        I order;
        INLINE Ranks(const float *t, const uint8_t *order_of_ranks) {
            eighth = all(t[7]), fourth[0] = all(t[3]), fourth[1] = all(t[11]);
            second = counted_down(t + 1, 4);
            first[0] = counted_down(t, 2), first[1] = counted_down(t + 8, 2);
            order = _mm256_broadcastsi128_si256(sixteen(order_of_ranks));
        }
        static INLINE V counted_down(const float *t, int step) {
            const __m128 four = _mm_setr_ps(t[0], t[3 * step], t[2 * step], t[step]);
            return _mm256_set_m128(four, four);
        }
    };
    // How many thresholds lie below, as a negative number.
    static INLINE I rank(V v, const Ranks &ranks) {
        const V upper = _mm256_cmp_ps(v, ranks.eighth, _CMP_GT_OQ);
        I rank = deeper(v, _mm256_castps_si256(upper), _mm256_blendv_ps(ranks.fourth[0], ranks.fourth[1], upper));
        rank = deeper(v, rank, _mm256_permutevar_ps(ranks.second, rank));
        return deeper(v, rank,
                      _mm256_blendv_ps(_mm256_permutevar_ps(ranks.first[0], rank),
                                       _mm256_permutevar_ps(ranks.first[1], rank), upper));
    }
    static INLINE I deeper(V v, I rank, V middle) {
        const I above = _mm256_castps_si256(_mm256_cmp_ps(v, middle, _CMP_GT_OQ));
        return _mm256_add_epi32(_mm256_add_epi32(rank, rank), above);
    }
    // The codes of 32 ranks to 16 bytes.
    static INLINE void pack(uint8_t *to, const I *found, const Ranks &ranks) {
        // Within each half of a register: four ranks of each of the four vectors.
        const I bytes = _mm256_packs_epi16(_mm256_packs_epi32(found[0], found[1]),
                                           _mm256_packs_epi32(found[2], found[3]));
        const I codes = _mm256_shuffle_epi8(ranks.order, _mm256_abs_epi8(bytes));
        const I pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
        const I packed = _mm256_packus_epi16(pairs, pairs);
        const __m128i in_order = _mm_unpacklo_epi16(_mm256_castsi256_si128(packed),
                                                    _mm256_extracti128_si256(packed, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to), in_order);
    }
    // What `vhaddps` gives, which takes twice as long on some processors.
    static INLINE V folded(V a, V b) {
        return plus(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
    }
    // The sums over the lanes of four vectors.
    static INLINE void sums(float *to, V a, V b, V c, V d) {
        const V all_four = folded(folded(a, b), folded(c, d));
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
    using Scaled = uint8x16x4_t;  // byte 0 of the 16 values, and so on
    using Halves = uint8x16x2_t;
#else
    static constexpr int forward_rows = 2, backward_rows = 4;
    struct Scaled {
        float value[16];
    };
    struct Halves {
        uint16_t value[16];
    };
#endif
    using Levels = const float *;

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

    static INLINE Levels levels(const float *table) { return table; }
#if defined(__ARM_NEON) && !defined(PENNYWEIGHT_PLAIN)
    static INLINE V fused(V a, V b, V c) {
        return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    }
    static INLINE Scaled scaled(Levels levels, float scale, Type type) {
        float values[16];
        for (int i = 0; i < 16; i += 4) store(values + i, rounded(load(levels + i) * all(scale), type));
        return vld4q_u8(reinterpret_cast<const uint8_t *>(values));
    }
    static INLINE Halves halves(Levels levels, float scale, Type type) {
        uint16_t values[16];
        for (int i = 0; i < 16; i += 4) store(values + i, load(levels + i) * all(scale), type);
        return vld2q_u8(reinterpret_cast<const uint8_t *>(values));
    }
    // The codes of 16 bytes, the high half of a byte first.
    static INLINE uint8x16x2_t codes(const uint8_t *from) {
        const uint8x16_t bytes = vld1q_u8(from);
        return vzipq_u8(vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15)));
    }
    static INLINE void look_up(V *to, Scaled scaled, const uint8_t *from) {
        const uint8x16x2_t index = codes(from);
        for (int i = 0; i < 2; ++i) {
            uint8x16_t of[4];
            for (int j = 0; j < 4; ++j) of[j] = vqtbl1q_u8(scaled.val[j], index.val[i]);
            const uint8x16x2_t low = vzipq_u8(of[0], of[1]), high = vzipq_u8(of[2], of[3]);
            for (int j = 0; j < 2; ++j) {
                const uint16x8x2_t both =
                    vzipq_u16(vreinterpretq_u16_u8(low.val[j]), vreinterpretq_u16_u8(high.val[j]));
                to[4 * i + 2 * j] = (V)vreinterpretq_f32_u16(both.val[0]);
                to[4 * i + 2 * j + 1] = (V)vreinterpretq_f32_u16(both.val[1]);
            }
        }
    }
    template <bool past_caches>
    static INLINE void write(uint16_t *to, Halves table, const uint8_t *from) {
        const uint8x16x2_t index = codes(from);
        for (int i = 0; i < 2; ++i) {
            const uint8x16x2_t values = {vqtbl1q_u8(table.val[0], index.val[i]), vqtbl1q_u8(table.val[1], index.val[i])};
            vst2q_u8(reinterpret_cast<uint8_t *>(to + 16 * i), values);
        }
    }
#else
    static INLINE V fused(V a, V b, V c) { return a * b + c; }
    static INLINE Scaled scaled(Levels levels, float scale, Type type) {
        Scaled found;
        for (int i = 0; i < 16; i += 4) store(found.value + i, rounded(load(levels + i) * all(scale), type));
        return found;
    }
    static INLINE Halves halves(Levels levels, float scale, Type type) {
        Halves found;
        for (int i = 0; i < 16; i += 4) store(found.value + i, load(levels + i) * all(scale), type);
        return found;
    }
    template <class T>
    static INLINE void copied(T *to, const T *value, const uint8_t *codes) {
        for (int i = 0; i < 16; ++i) {
            to[2 * i] = value[codes[i] >> 4];
            to[2 * i + 1] = value[codes[i] & 15];
        }
    }
    static INLINE void look_up(V *to, const Scaled &scaled, const uint8_t *codes) {
        float values[32];
        copied(values, scaled.value, codes);
        for (int i = 0; i < 8; ++i) to[i] = load(values + 4 * i);
    }
    template <bool past_caches>
    static INLINE void write(uint16_t *to, const Halves &table, const uint8_t *codes) {
        copied(to, table.value, codes);
    }
#endif

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
    static INLINE I rank(V v, const Ranks &ranks) {
        I rank = {0, 0, 0, 0};
        for (int i = 0; i < 15; ++i) rank -= (I)(v > all(ranks.thresholds[i]));
        return rank;
    }
    static INLINE void pack(uint8_t *to, const I *found, const Ranks &ranks) {
        for (int i = 0; i < 16; ++i) {
            const I of = found[i / 2];
            to[i] = static_cast<uint8_t>(ranks.order[of[i % 2 * 2]] << 4 | ranks.order[of[i % 2 * 2 + 1]]);
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
